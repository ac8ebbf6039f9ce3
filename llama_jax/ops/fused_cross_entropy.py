"""Cross-entropy whose gradient is computed in the forward pass, chunk by chunk: logits are computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.ops.fused_head import Shard, fused_head_loss


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
    return fused_head_loss(
        _cross_entropy, [(x, params)], (targets, weights), (z_loss,), num_chunks=num_chunks
    )


def _cross_entropy(
    heads: tuple[jax.Array, ...],
    tokens: tuple[jax.Array, ...],
    constants: tuple[jax.Array, ...],
    shard: Shard,
) -> tuple[jax.Array, Callable[[], jax.Array]]:
    (logits,), (targets, weights), (z_loss,) = heads, tokens, constants
    is_target = shard.first_id + jnp.arange(shard.size, dtype=jnp.int32) == targets[..., None]
    max_logit = shard.max(jax.lax.stop_gradient(logits.max(-1)))
    exps = jnp.exp(logits - max_logit[..., None])
    sums = shard.sum(exps.sum(-1))
    log_z = max_logit + jnp.log(sums)
    target_logit = shard.sum(jnp.where(is_target, logits, 0.0).sum(-1))

    def gradient() -> jax.Array:
        factor = weights * (1 + 2 * z_loss * log_z) / sums
        return exps * factor[..., None] - jnp.where(is_target, weights[..., None], 0.0)

    return (weights * (log_z - target_logit + z_loss * log_z**2)).sum(), gradient
