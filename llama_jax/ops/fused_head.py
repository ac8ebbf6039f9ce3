"""Losses of logits whose gradient is computed in the forward pass, chunk by chunk: logits are computed once.

Whatever follows a scalar loss only scales its gradient. So the forward pass computes the gradients of the
hidden states and of the output projection, and the backward pass multiplies them by the cotangent. Each
device computes its own batch rows and its own shard of the vocabulary; the gradient of the projection is
reduced over devices once, after the last chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import meshes, sharding
from llama_jax.ops import spmd
from llama_jax.ops.products import dot, weight_gradient

_GATHERED_DV = P(None, "tensor")  # the output projection, gathered over fsdp and context


@dataclasses.dataclass(frozen=True)
class Shard:
    """One device's shard of the vocabulary.

    Attributes:
      first_id: its first id.
      size: its number of ids.
      axes: the names of the mesh axes that shard the vocabulary.
    """

    first_id: Any
    size: int
    axes: tuple[str, ...]

    def sum(self, x: jax.Array) -> jax.Array:
        """Sums over all shards."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x: jax.Array) -> jax.Array:
        """The maximum over all shards."""
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def concatenate(self, x: jax.Array) -> jax.Array:
        """[..., k] of each shard, in the order of their ids: [..., shards * k]."""
        return jax.lax.all_gather(x, self.axes, axis=x.ndim - 1, tiled=True) if self.axes else x


# (each head's logits f32 [B, t, V / shards], arrays of tokens [B, t], constants, the shard) -> the sum of the
# losses of these tokens, f32 [], and the function that computes its gradient by the first head's logits.
LogitsLoss = Callable[
    [tuple[jax.Array, ...], tuple[jax.Array, ...], tuple[jax.Array, ...], Shard],
    tuple[jax.Array, Callable[[], jax.Array]],
]


@dataclasses.dataclass(frozen=True)
class _Heads:
    """What is static about the heads: whether each is tied, and the stored layout of its weight."""

    tied: tuple[bool, ...]
    weight_specs: tuple[P, ...]


def fused_head_loss(
    loss: LogitsLoss,
    heads: Sequence[tuple[jax.Array, Any]],
    tokens: tuple[jax.Array, ...],
    constants: tuple[jax.Array, ...] = (),
    *,
    num_chunks: int,
) -> jax.Array:
    """Sums a loss of logits over tokens, in chunks.

    Differentiable in reverse mode only, with respect to the hidden states and the output projection of the
    first head: the others are constants.

    Args:
      loss: computes the loss of a chunk; hashable.
      heads: hidden states [B, T, D] in the compute dtype, and the parameter tree, of each model; only the
        output projection is read. All have the same vocabulary.
      tokens: arrays [B, T], padded with zeros, for which the loss must be 0.
      constants: arrays [].
      num_chunks: number of chunks of T; a device's logits are f32 [B, T / num_chunks, V] at a time.

    Returns:
      f32 [], summed over all devices.
    """
    ties = tuple("lm_head" not in params for _, params in heads)
    weights = tuple(
        params["embed"]["embedding"] if tied else params["lm_head"]["kernel"]
        for (_, params), tied in zip(heads, ties, strict=True)
    )
    specs = tuple(sharding.EMBEDDING_VD if tied else sharding.HEAD_DV for tied in ties)
    inputs = tuple(
        sharding.constrain(x, sharding.ACT_BTD)
        if sharding.spec_of(x) != sharding.out_sharding(sharding.ACT_BTD, x.shape)
        else x
        for x, _ in heads
    )
    arguments = spmd.pvary_like((inputs, weights, tokens, constants))
    return _loss(loss, num_chunks, _Heads(ties, specs), *arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(loss: LogitsLoss, num_chunks: int, heads: _Heads, *arguments: Any) -> Any:
    return _over_devices(False, loss, num_chunks, heads, *arguments)[0]


def _loss_forward(loss: LogitsLoss, num_chunks: int, heads: _Heads, *arguments: Any) -> Any:
    total, d_x, d_weight = _over_devices(True, loss, num_chunks, heads, *arguments)
    return total, (d_x, d_weight.astype(arguments[1][0].dtype))


def _loss_backward(
    loss: LogitsLoss, num_chunks: int, heads: _Heads, residuals: Any, d_total: jax.Array
) -> Any:
    d_x, d_weight = ((gradient * d_total).astype(gradient.dtype) for gradient in residuals)
    constant = (None,) * (len(heads.tied) - 1)
    return (d_x, *constant), (d_weight, *constant), None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _over_devices(
    gradients: bool,
    loss: LogitsLoss,
    num_chunks: int,
    heads: _Heads,
    inputs: tuple[jax.Array, ...],
    weights: tuple[jax.Array, ...],
    tokens: tuple[jax.Array, ...],
    constants: tuple[jax.Array, ...],
) -> Any:
    """`_local` on every device: (total,), or (total, d_x, d_weight) with `gradients`."""
    weights = tuple(
        sharding.gather(weight.astype(x.dtype), spec)
        for x, weight, spec in zip(inputs, weights, heads.weight_specs, strict=True)
    )
    axes = tuple(name for name in meshes.ALL_AXES if name in sharding.explicit_axes())
    shards = sharding.explicit_axes()["tensor"] if sharding.is_sequence_parallel(inputs[0]) else 1
    local = functools.partial(_local, gradients, loss, num_chunks, heads.tied, axes, shards)
    gathered = tuple(P(*reversed(_GATHERED_DV)) if tied else _GATHERED_DV for tied in heads.tied)
    x_specs = tuple(sharding.spec_of(x) or P() for x in inputs)
    in_specs = (x_specs, gathered, (sharding.TOKENS_BT,) * len(tokens), (P(),) * len(constants))
    out_specs = (P(), x_specs[0], heads.weight_specs[0]) if gradients else (P(),)
    return spmd.shard_map_or_call(local, in_specs, out_specs)(inputs, weights, tokens, constants)


def _local(
    gradients: bool,
    loss: LogitsLoss,
    num_chunks: int,
    ties: tuple[bool, ...],
    axes: tuple[str, ...],
    shards: int,
    *arguments: Any,
) -> Any:
    """One device's computation, with its collectives over `axes`, the names of the mesh axes.

    `tensor` may shard the sequence of x in `shards` parts, which are gathered chunk by chunk.
    """
    tensor = tuple(name for name in axes if name == "tensor")
    others = tuple(name for name in axes if name != "tensor")
    inputs, projections, tokens, constants = spmd.pvary_like(arguments)
    (x, *_), (weight, *_), tied = inputs, projections, ties[0]
    to_hidden = "btv,vd->btd" if tied else "btv,dv->btd"
    vocab_size = weight.shape[0] if tied else weight.shape[1]
    shard = Shard(jax.lax.axis_index("tensor") * vocab_size if tensor else 0, vocab_size, tensor)

    def step(carry: Any, chunk: Any) -> Any:
        inputs, tokens = chunk
        if shards > 1:
            inputs = tuple(jax.lax.all_gather(x, "tensor", axis=1, tiled=True) for x in inputs)
        logits = tuple(
            dot("btd,vd->btv" if tied else "btd,dv->btv", x, weight)
            for x, weight, tied in zip(inputs, projections, ties, strict=True)
        )
        total, gradient = loss(logits, tokens, constants, shard)
        if not gradients:
            return (carry[0] + total,), None
        x = inputs[0]
        d_logits = gradient().astype(x.dtype)
        # [D, V] in both cases: of the two operands, x is the smaller to transpose.
        d_weight = weight_gradient("btd", x, "btv", d_logits, "dv")
        d_x = dot(to_hidden, d_logits, weight)
        if shards > 1:
            d_x = jax.lax.psum_scatter(d_x.astype(x.dtype), "tensor", scatter_dimension=1, tiled=True)
        return (carry[0] + total, carry[1] + d_weight), d_x

    chunks = max(1, min(num_chunks, x.shape[1]))
    like = spmd.pvary_like(jnp.zeros((), jnp.float32), x)
    start = (like, jnp.zeros((x.shape[-1], vocab_size), jnp.float32) + like) if gradients else (like,)
    if shards > 1:
        tokens = tuple(_in_order_of_chunks(array, shards, chunks) for array in tokens)
    (total, *d_weight), d_x = jax.lax.scan(step, start, _split((inputs, tokens), chunks))
    # Equal on every device along `tensor`: pmax makes it invariant over that axis.
    total = shard.max(total)
    total = jax.lax.psum(total, others) if others else total
    if not gradients:
        return (total,)
    d_x = _join(d_x, x.shape)
    d_x = d_x if shards > 1 else shard.sum(d_x).astype(x.dtype)
    projection = spmd.reduce_scatter_grad(d_weight[0], 0, others)
    return total, d_x, projection.T if tied else projection


def _split(arrays: Any, chunks: int) -> Any:
    """[B, T, ...] -> [chunks, B, ceil(T / chunks), ...], padded with zeros, whose weight is zero."""

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, -x.shape[1] % chunks if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, arrays)


def _in_order_of_chunks(array: jax.Array, shards: int, chunks: int) -> jax.Array:
    """[B, T], padded and reordered so that the parts that the shards of T have in a chunk are neighbours."""
    array = array.reshape(array.shape[0], shards, -1)
    array = jnp.pad(array, ((0, 0), (0, 0), (0, -array.shape[2] % chunks)))
    return array.reshape(*array.shape[:2], chunks, -1).swapaxes(1, 2).reshape(array.shape[0], -1)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(shape[0], -1, *shape[2:])[:, : shape[1]]
