"""The auxiliary losses of routers: what keeps the load of experts even, and the router's logits small."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding


@chex.dataclass(frozen=True, mappable_dataclass=False)
class RouterLosses:
    """The auxiliary losses of the routers of all layers, f32 [] each.

    Attributes:
      balance: the load-balancing loss (Switch Transformer, arXiv 2101.03961, equations 4 to 6): E times the
        sum over experts of the fraction of choices times the mean probability, both over all tokens and
        layers, as in transformers' `load_balancing_loss_func`. k where the load is even, E at most.
      z: the mean over tokens and layers of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5).
    """

    balance: jax.Array
    z: jax.Array


def router_losses(logits: Any, num_experts_per_tok: int, is_token: jax.Array | None = None) -> RouterLosses:
    """The auxiliary losses of a batch, over all devices; inside a `shard_map` over `data` too.

    Args:
      logits: the routers' logits, a tree of f32 [..., B, T, E].
      num_experts_per_tok: k.
      is_token: bool [B, T], which positions count; None: all.
    """
    sums: Any = None
    for leaf in jax.tree.leaves(logits):
        weights = (
            jnp.ones(leaf.shape[-3:-1], jnp.float32) if is_token is None else is_token.astype(jnp.float32)
        )
        terms = _sums(leaf, num_experts_per_tok, weights)
        sums = terms if sums is None else jax.tree.map(jnp.add, sums, terms)
    if sharding.manual_size("data") > 1:
        sums = jax.lax.psum(sums, "data")
    choices, probabilities, squares, count = sums
    count = jnp.maximum(count, 1.0)
    balance = choices.shape[0] * jnp.sum(choices / count * (probabilities / count))
    return RouterLosses(balance=balance, z=squares / count)


def _sums(logits: jax.Array, k: int, weights: jax.Array) -> tuple[jax.Array, ...]:
    """Choices [E], probabilities [E], squares [] and tokens [], summed over logits [..., B, T, E]."""
    spec = sharding.spec_of(logits)
    if spec is not None:
        weights = jax.sharding.reshard(weights, P(*spec[-3:-1]))
    weights = jnp.broadcast_to(
        weights, logits.shape[:-1], out_sharding=None if spec is None else P(*spec[:-1])
    )
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # The k-th largest by comparison, ties to the first, as `top_k`: elementwise, it keeps any sharding.
    index = jnp.arange(logits.shape[-1])
    other, own = jax.lax.stop_gradient((logits[..., None, :], logits[..., None]))
    ahead = (other > own) | ((other == own) & (index[None, :] < index[:, None]))
    is_chosen = ahead.sum(-1) < k
    axes = tuple(range(logits.ndim - 1))
    return (
        jnp.where(is_chosen, weights[..., None], 0.0).sum(axes),
        (weights[..., None] * jnp.exp(logits - log_z[..., None])).sum(axes),
        (weights * log_z**2).sum(),
        weights.sum(),
    )
