"""Cross-entropy whose gradient is computed in the forward pass, chunk by chunk: logits are computed once.

Whatever follows a scalar loss only scales its gradient. So the forward pass computes the gradients of the
hidden states and of the output projection, and the backward pass multiplies them by the cotangent. Each
device computes its own batch rows and its own shard of the vocabulary; the gradient of the projection is
reduced over devices once, after the last chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import meshes, sharding
from llama_jax.ops import spmd
from llama_jax.ops.products import dot, weight_gradient

_GATHERED_DV = P(None, "tensor")  # the output projection, gathered over fsdp and context


def fused_cross_entropy(
    x: jax.Array,
    params: Any,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: jax.Array,
    *,
    num_chunks: int,
) -> jax.Array:
    """sum of weights * (logsumexp(logits) - logits[target] + z_loss * logsumexp(logits)^2).

    Differentiable with respect to `x` and the output projection, in reverse mode only.

    Args:
      x: hidden states [B, T, D] in the compute dtype.
      params: the parameter tree; only the output projection is read.
      targets: int [B, T].
      weights: f32 [B, T].
      z_loss: f32 [].
      num_chunks: number of chunks of T; a device's logits are f32 [B, T / num_chunks, V] at a time.

    Returns:
      f32 [], summed over all devices.
    """
    tied = "lm_head" not in params
    weight = params["embed"]["embedding"] if tied else params["lm_head"]["kernel"]
    weight_spec = sharding.EMBEDDING_VD if tied else sharding.HEAD_DV
    if sharding.spec_of(x) != sharding.out_sharding(sharding.ACT_BTD, x.shape):
        x = sharding.constrain(x, sharding.ACT_BTD)
    x, weight, targets, weights, z_loss = spmd.pvary_like((x, weight, targets, weights, z_loss))
    return _loss(num_chunks, tied, weight_spec, x, weight, targets, weights, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(
    num_chunks: int, tied: bool, weight_spec: P, x: jax.Array, weight: jax.Array, *rest: jax.Array
) -> Any:
    return _over_devices(False, num_chunks, tied, weight_spec, x, weight, *rest)[0]


def _loss_forward(num_chunks: int, tied: bool, weight_spec: P, x: Any, weight: Any, *rest: Any) -> Any:
    total, d_x, d_weight = _over_devices(True, num_chunks, tied, weight_spec, x, weight, *rest)
    return total, (d_x, d_weight.astype(weight.dtype))


def _loss_backward(num_chunks: int, tied: bool, weight_spec: P, residuals: Any, d_total: jax.Array) -> Any:
    return *((gradient * d_total).astype(gradient.dtype) for gradient in residuals), None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _over_devices(
    gradients: bool,
    num_chunks: int,
    tied: bool,
    weight_spec: P,
    x: jax.Array,
    weight: jax.Array,
    *rest: jax.Array,
) -> Any:
    """`_local` on every device: (total,), or (total, d_x, d_weight) with `gradients`."""
    weight = sharding.gather(weight.astype(x.dtype), weight_spec)
    axes = tuple(name for name in meshes.ALL_AXES if name in sharding.explicit_axes())
    shards = sharding.explicit_axes()["tensor"] if sharding.is_sequence_parallel(x) else 1
    local = functools.partial(_local, gradients, num_chunks, tied, axes, shards)
    gathered_spec = P(*reversed(_GATHERED_DV)) if tied else _GATHERED_DV
    x_spec = sharding.spec_of(x) or P()
    in_specs = (x_spec, gathered_spec, sharding.TOKENS_BT, sharding.TOKENS_BT, P())
    out_specs = (P(), x_spec, weight_spec) if gradients else (P(),)
    return spmd.shard_map_or_call(local, in_specs, out_specs)(x, weight, *rest)


def _local(
    gradients: bool,
    num_chunks: int,
    tied: bool,
    axes: tuple[str, ...],
    shards: int,
    x: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: jax.Array,
) -> Any:
    """One device's computation, with its collectives over `axes`, the names of the mesh axes.

    `tensor` may shard the sequence of x in `shards` parts, which are gathered chunk by chunk.
    """
    tensor = tuple(name for name in axes if name == "tensor")
    others = tuple(name for name in axes if name != "tensor")
    x, weight, targets, weights, z_loss = spmd.pvary_like((x, weight, targets, weights, z_loss))
    to_logits = "btd,vd->btv" if tied else "btd,dv->btv"
    to_hidden = "btv,vd->btd" if tied else "btv,dv->btd"
    vocab_size = weight.shape[0] if tied else weight.shape[1]
    first_id = jax.lax.axis_index("tensor") * vocab_size if tensor else 0

    vocab_sum = (lambda y: jax.lax.psum(y, tensor)) if tensor else (lambda y: y)
    vocab_max = (lambda y: jax.lax.pmax(y, tensor)) if tensor else (lambda y: y)

    def step(carry: Any, chunk: Any) -> Any:
        x, targets, weights = chunk
        if shards > 1:
            x = jax.lax.all_gather(x, "tensor", axis=1, tiled=True)
        logits = dot(to_logits, x, weight)
        is_target = first_id + jnp.arange(vocab_size, dtype=jnp.int32) == targets[..., None]
        max_logit = vocab_max(jax.lax.stop_gradient(logits.max(-1)))
        exps = jnp.exp(logits - max_logit[..., None])
        sums = vocab_sum(exps.sum(-1))
        log_z = max_logit + jnp.log(sums)
        target_logit = vocab_sum(jnp.where(is_target, logits, 0.0).sum(-1))
        total = (weights * (log_z - target_logit + z_loss * log_z**2)).sum()
        if not gradients:
            return (carry[0] + total,), None
        # The derivative of `total` with respect to the logits.
        factor = weights * (1 + 2 * z_loss * log_z) / sums
        d_logits = exps * factor[..., None] - jnp.where(is_target, weights[..., None], 0.0)
        d_logits = d_logits.astype(x.dtype)
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
        targets, weights = (_in_order_of_chunks(array, shards, chunks) for array in (targets, weights))
    (total, *d_weight), d_x = jax.lax.scan(step, start, _split((x, targets, weights), chunks))
    # Equal on every device along `tensor`: pmax makes it invariant over that axis.
    total = vocab_max(total)
    total = jax.lax.psum(total, others) if others else total
    if not gradients:
        return (total,)
    d_x = _join(d_x, x.shape)
    d_x = d_x if shards > 1 else vocab_sum(d_x).astype(x.dtype)
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
