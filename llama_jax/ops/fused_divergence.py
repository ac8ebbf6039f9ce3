"""Divergences of a student's next-token distribution from a teacher's, in chunks, with their gradient.

As in `fused_head`, the gradient is computed in the forward pass: the logits of both models are computed once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.ops.fused_head import Shard, fused_head_loss


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1), in nats.

    With p the teacher's and q the student's distribution, and m = beta p + (1 - beta) q:

        KL(p || q)                                     beta = 0: forward KL
        KL(q || p)                                     beta = 1: reverse KL
        beta KL(p || m) + (1 - beta) KL(q || m)        otherwise

    With `top_k`, p and q are distributions over the teacher's k most likely tokens, and all others as one:
    the divergence is at most that of the whole vocabulary, and 0 only if both agree on those k.

    Attributes:
      beta: in [0, 1].
      temperature: both models' logits are divided by it, above 0.
      top_k: k, of two equal logits that of the lower id; 0 for the whole vocabulary.
    """

    beta: float = 0.0
    temperature: float = 1.0
    top_k: int = 0

    def __call__(
        self,
        heads: tuple[jax.Array, ...],
        tokens: tuple[jax.Array, ...],
        constants: tuple[jax.Array, ...],
        shard: Shard,
    ) -> tuple[jax.Array, Callable[[], jax.Array]]:
        """The divergences of a chunk, weighted and summed, and their gradient; a `LogitsLoss`.

        Args:
          heads: the student's and the teacher's logits, f32 [B, t, V / shards].
          tokens: the weights, f32 [B, t].
          constants: none.
          shard: of the vocabulary.
        """
        del constants
        (weights,) = tokens
        student, teacher = (logits / self.temperature for logits in heads)
        log_q, log_p = _log_softmax(student, shard), _log_softmax(teacher, shard)
        tail_q = tail_p = None
        events = jnp.ones(log_p.shape, bool)
        if self.top_k:
            events = _top_k(teacher, self.top_k, shard)
            tail_q, tail_p = (_log_tail(x, events, shard) for x in (log_q, log_p))

        def total(term: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
            """The sum over events of a function of log p and log q, f32 [B, t]."""
            value = shard.sum(jnp.where(events, term(log_p, log_q), 0.0).sum(-1))
            if tail_q is None or tail_p is None:
                return value
            # An empty tail has log-probabilities of -inf, and no term.
            is_empty = jnp.isneginf(tail_p) | jnp.isneginf(tail_q)
            p, q = (jnp.where(is_empty, 0.0, x) for x in (tail_p, tail_q))
            return value + jnp.where(is_empty, 0.0, term(p, q))

        divergence = total(self._term)

        def gradient() -> jax.Array:
            # D is a sum over events of f(p, q). With g = df/dq of the event that token v belongs to,
            # dD/d(logit v) = q_v (g_v - sum_u q_u g_u) / temperature; `_slope` is q g.
            slope = self._slope(log_p, log_q)
            if tail_q is not None and tail_p is not None:
                is_empty = jnp.isneginf(tail_p) | jnp.isneginf(tail_q)
                p, q = (jnp.where(is_empty, 0.0, x)[..., None] for x in (tail_p, tail_q))
                share = jnp.exp(log_q - q)  # of the token in the tail
                in_tail = jnp.where(is_empty[..., None], 0.0, share * self._slope(p, q))
                slope = jnp.where(events, slope, in_tail)
            mean = shard.sum(slope.sum(-1))
            factor = (weights / self.temperature)[..., None]
            return factor * (slope - jnp.exp(log_q) * mean[..., None])

        return (weights * divergence).sum(), gradient

    def _term(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        """f(p, q), of which the divergence is the sum."""
        if self.beta == 0:
            return jnp.exp(log_p) * (log_p - log_q)
        if self.beta == 1:
            return jnp.exp(log_q) * (log_q - log_p)
        log_m = self._log_mixture(log_p, log_q)
        of_teacher = jnp.exp(log_p) * (log_p - log_m)
        return self.beta * of_teacher + (1 - self.beta) * jnp.exp(log_q) * (log_q - log_m)

    def _slope(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        """q df/dq, up to a multiple of q, which the gradient by the logits does not depend on."""
        if self.beta == 0:
            return -jnp.exp(log_p)
        if self.beta == 1:
            return jnp.exp(log_q) * (log_q - log_p)
        return (1 - self.beta) * jnp.exp(log_q) * (log_q - self._log_mixture(log_p, log_q))

    def _log_mixture(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        return jnp.logaddexp(log_p + math.log(self.beta), log_q + math.log1p(-self.beta))


def fused_divergence(
    divergence: Divergence,
    student: tuple[jax.Array, Any],
    teacher: tuple[jax.Array, Any],
    weights: jax.Array,
    *,
    num_chunks: int,
) -> jax.Array:
    """The sum over tokens of weights * divergence.

    Differentiable with respect to the student's hidden states and output projection, in reverse mode only.

    Args:
      divergence: which.
      student, teacher: hidden states [B, T, D] in the compute dtype, each with its D, and the parameter tree,
        of which only the output projection is read. Both have the same vocabulary.
      weights: f32 [B, T].
      num_chunks: number of chunks of T; a device's logits are f32 [B, T / num_chunks, V] at a time.

    Returns:
      f32 [], summed over all devices.
    """
    heads = [student, (jax.lax.stop_gradient(teacher[0]), teacher[1])]
    return fused_head_loss(divergence, heads, (weights,), num_chunks=num_chunks)


def _log_softmax(logits: jax.Array, shard: Shard) -> jax.Array:
    """f32 [B, t, V / shards], normalized over all shards."""
    shifted = logits - shard.max(jax.lax.stop_gradient(logits.max(-1)))[..., None]
    return shifted - jnp.log(shard.sum(jnp.exp(shifted).sum(-1)))[..., None]


def _top_k(logits: jax.Array, k: int, shard: Shard) -> jax.Array:
    """bool [B, t, V / shards]: which are the k largest of all shards, of equal ones those of lower ids."""
    values, ids = jax.lax.top_k(logits, min(k, shard.size))
    # In the order of the shards, so that the first of equal ones has the lowest id here too.
    values, ids = shard.concatenate(values), shard.concatenate(ids + shard.first_id)
    values, places = jax.lax.top_k(values, k)
    least = values[..., -1:]
    last = jnp.take_along_axis(ids, places[..., -1:], axis=-1)
    own_ids = shard.first_id + jnp.arange(shard.size, dtype=ids.dtype)
    return (logits > least) | ((logits == least) & (own_ids <= last))


def _log_tail(logprobs: jax.Array, events: jax.Array, shard: Shard) -> jax.Array:
    """log of the probability of all tokens that are no events, f32 [B, t]; -inf if there are none."""
    others = jnp.where(events, -jnp.inf, logprobs)
    most = shard.max(others.max(-1))
    most = jnp.where(jnp.isneginf(most), 0.0, most)
    return most + jnp.log(shard.sum(jnp.exp(others - most[..., None]).sum(-1)))
