"""Cross-entropy whose gradient is formed in the forward pass, chunk by chunk: logits are computed once.

The gradient of a sum of losses does not depend on what is done with the sum but for a factor, so both
gradients (of the hidden states and of the output projection) are ready when the loss is, and the backward
pass only scales them. Each device works on its own rows and its own part of the vocabulary; the
projection's gradient crosses devices once, after the last chunk.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops import spmd
from llama_jax.ops.products import dot, weight_gradient

_WHOLE_DV = P(None, "tensor")  # the output projection, gathered over fsdp


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

    Differentiable in `x` and the output projection, in reverse mode alone.

    Args:
      x: hidden states [B, T, D] in the compute dtype.
      params: the tree that holds the output projection.
      targets: int [B, T].
      weights: f32 [B, T].
      z_loss: f32 [].
      num_chunks: in how many pieces of T a device forms its logits, f32 [B, T / num_chunks, V].

    Returns:
      f32 [], the total over all devices.
    """
    tied = "lm_head" not in params
    weight = params["embed"]["embedding"] if tied else params["lm_head"]["kernel"]
    stored = sharding.EMBEDDING_VD if tied else sharding.HEAD_DV
    x, weight, targets, weights, z_loss = spmd.pvary_like((x, weight, targets, weights, z_loss))
    return _loss(num_chunks, tied, stored, x, weight, targets, weights, z_loss)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(num_chunks: int, tied: bool, stored: P, x: jax.Array, weight: jax.Array, *rest: jax.Array) -> Any:
    return _over_devices(False, num_chunks, tied, stored, x, weight, *rest)[0]


def _loss_forward(num_chunks: int, tied: bool, stored: P, x: Any, weight: Any, *rest: Any) -> Any:
    total, d_x, d_weight = _over_devices(True, num_chunks, tied, stored, x, weight, *rest)
    return total, (d_x, d_weight.astype(weight.dtype))


def _loss_backward(num_chunks: int, tied: bool, stored: P, saved: Any, d_total: jax.Array) -> Any:
    return *((gradient * d_total).astype(gradient.dtype) for gradient in saved), None, None, None


_loss.defvjp(_loss_forward, _loss_backward)


def _over_devices(
    gradients: bool, num_chunks: int, tied: bool, stored: P, x: jax.Array, weight: jax.Array, *rest: jax.Array
) -> Any:
    """Runs `_local` on every device's part; returns (total, d_x or None, d_weight or None)."""
    weight = sharding.gather(weight.astype(x.dtype), stored)
    axes = tuple(name for name in sharding.AXES if name in sharding.explicit_axes())
    local = functools.partial(_local, gradients, num_chunks, tied, axes)
    whole = P(*reversed(_WHOLE_DV)) if tied else _WHOLE_DV
    specs = (sharding.ACT_BTD, whole, sharding.TOKENS_BT, sharding.TOKENS_BT, P())
    out = (P(), sharding.ACT_BTD, stored) if gradients else (P(),)
    return spmd.shard_map_or_call(local, specs, out)(x, weight, *rest)


def _local(
    gradients: bool,
    num_chunks: int,
    tied: bool,
    axes: tuple[str, ...],
    x: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: jax.Array,
) -> Any:
    """One device's share, and the collectives that make it whole; `axes` are the mesh's, if there is one."""
    tensor = tuple(name for name in axes if name == "tensor")
    others = tuple(name for name in axes if name != "tensor")
    x, weight, targets, weights, z_loss = spmd.pvary_like((x, weight, targets, weights, z_loss))
    logits_of = "btd,vd->btv" if tied else "btd,dv->btv"
    hidden_of = "btv,vd->btd" if tied else "btv,dv->btd"
    vocabulary = weight.shape[0] if tied else weight.shape[1]
    first = jax.lax.axis_index("tensor") * vocabulary if tensor else 0

    over_vocabulary = (lambda y: jax.lax.psum(y, tensor)) if tensor else (lambda y: y)
    highest = (lambda y: jax.lax.pmax(y, tensor)) if tensor else (lambda y: y)

    def one(carry: Any, chunk: Any) -> Any:
        x, targets, weights = chunk
        logits = dot(logits_of, x, weight)
        is_target = first + jnp.arange(vocabulary, dtype=jnp.int32) == targets[..., None]
        peak = highest(jax.lax.stop_gradient(logits.max(-1)))
        powers = jnp.exp(logits - peak[..., None])
        sums = over_vocabulary(powers.sum(-1))
        log_total = peak + jnp.log(sums)
        picked = over_vocabulary(jnp.where(is_target, logits, 0.0).sum(-1))
        total = (weights * (log_total - picked + z_loss * log_total**2)).sum()
        if not gradients:
            return (carry[0] + total,), None
        # d/dlogits of the line above.
        slope = weights * (1 + 2 * z_loss * log_total) / sums
        d_logits = powers * slope[..., None] - jnp.where(is_target, weights[..., None], 0.0)
        d_logits = d_logits.astype(x.dtype)
        # As [D, V] in both cases: x is the small side to transpose.
        d_weight = weight_gradient("btd", x, "btv", d_logits, "dv")
        return (carry[0] + total, carry[1] + d_weight), dot(hidden_of, d_logits, weight)

    chunks = max(1, min(num_chunks, x.shape[1]))
    like = spmd.pvary_like(jnp.zeros((), jnp.float32), x)
    start = (like, jnp.zeros((x.shape[-1], vocabulary), jnp.float32) + like) if gradients else (like,)
    (total, *d_weight), d_x = jax.lax.scan(one, start, _cut((x, targets, weights), chunks))
    # The totals are the same on every device along `tensor`: the largest of them is any of them.
    total = highest(total)
    total = jax.lax.psum(total, others) if others else total
    if not gradients:
        return (total,)
    d_x = over_vocabulary(_join(d_x, x.shape)).astype(x.dtype)
    projection = spmd.reduce_scatter_grad(d_weight[0], 0, others)
    return total, d_x, projection.T if tied else projection


def _cut(arrays: Any, chunks: int) -> Any:
    """[B, T, ...] -> [chunks, B, ceil(T / chunks), ...], padded with zeros, which weigh nothing."""

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, -x.shape[1] % chunks if axis == 1 else 0) for axis in range(x.ndim)])
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, -1, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, arrays)


def _join(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.moveaxis(x, 0, 1).reshape(shape[0], -1, *shape[2:])[:, : shape[1]]
