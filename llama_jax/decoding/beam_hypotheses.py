"""Beam hypotheses as arrays [B, beams, ...]: how they are scored, extended by a token, and selected."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding

BEAMS_BNX = P(sharding.BATCH, None, None)  # [B, beams, anything]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class BeamSearchOutput:
    """The result of `beam_search`: R sequences of each row, best first.

    Where there are fewer (forced tokens may leave only one), the rest has score -inf and length 0.

    Attributes:
      tokens: int32 [B, R, max_new_tokens], 0 after the end of a sequence.
      lengths: int32 [B, R], generated tokens of each sequence, the end-of-sequence token included.
      scores: f32 [B, R], the sum of the tokens' log-probabilities over length ** length_penalty.
      logprobs: f32 [B, R, max_new_tokens], the model's log-probability of each token before any logits
        processor, 0 after the end of a sequence.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array
    logprobs: jax.Array


class Candidates(NamedTuple):
    """Hypotheses extended by one token, [B, n].

    Attributes:
      scores: f32, sums of log-probabilities.
      parent: int32, the beam that each extends.
      token: int32.
      ends: bool, whether the token is an end-of-sequence token.
    """

    scores: jax.Array
    parent: jax.Array
    token: jax.Array
    ends: jax.Array


_Hypotheses = TypeVar("_Hypotheses", BeamSearchOutput, Candidates)


def length_normalized(total: jax.Array, length: jax.Array, length_penalty: jax.Array) -> jax.Array:
    """total f32 [B, n] / length ** length_penalty [B], for a length that is a scalar or [B, 1]."""
    return total / length.astype(jnp.float32) ** length_penalty[:, None]


def expand(totals: jax.Array, eos_ids: jax.Array) -> tuple[Candidates, Candidates]:
    """The best continuations of each beam, and every way to end it.

    Args:
      totals: f32 [B, beams, V], sums of log-probabilities with each next token.
      eos_ids: int32 [E].

    Returns:
      Candidates [B, beams * beams] that go on, at least as many per beam as can be kept; and candidates
      [B, beams * E] that end.
    """
    batch, beams, vocab_size = totals.shape
    is_eos = (jnp.arange(vocab_size)[:, None] == eos_ids).any(-1)
    scores, token = jax.lax.top_k(jnp.where(is_eos, -jnp.inf, totals), beams)
    duplicate = jnp.tril(eos_ids[:, None] == eos_ids, -1).any(-1)
    eos_scores = totals.at[:, :, jnp.where(duplicate, -1, eos_ids)].get(
        mode="fill",
        fill_value=-jnp.inf,
        wrap_negative_indices=False,
        out_sharding=sharding.out_sharding(BEAMS_BNX, (batch, beams, eos_ids.size)),
    )

    def flatten(scores: jax.Array, token: jax.Array, ends: bool) -> Candidates:
        parent = jnp.zeros_like(token) + jnp.arange(beams, dtype=jnp.int32)[:, None]
        fields = scores, parent, token, jnp.full_like(token, ends, bool)
        return Candidates(*(field.reshape(batch, -1) for field in fields))

    eos_token = jnp.zeros_like(eos_scores, jnp.int32) + eos_ids
    return flatten(scores, token, False), flatten(eos_scores, eos_token, True)


def extend(
    hypotheses: BeamSearchOutput, candidates: Candidates, column: jax.Array, logprobs: jax.Array
) -> BeamSearchOutput:
    """The hypotheses that candidates [B, n] stand for, with the candidates' scores.

    Args:
      hypotheses: the beams that the candidates extend, [B, beams].
      candidates: [B, n].
      column: int32 [B], where the new token is written.
      logprobs: f32 [B, beams, V], the model's log-probabilities of the next token.
    """
    old = gather_beams(hypotheses, candidates.parent)
    is_new = jnp.arange(old.tokens.shape[-1]) == column[:, None, None]
    logprob = jax.vmap(lambda row, parent, token: row[parent, token])(
        logprobs, candidates.parent, candidates.token
    )
    return BeamSearchOutput(
        tokens=jnp.where(is_new, candidates.token[..., None], old.tokens),
        lengths=old.lengths + 1,
        scores=candidates.scores,
        logprobs=jnp.where(is_new, logprob[..., None], old.logprobs),
    )


def select_top(count: int, *hypotheses: _Hypotheses) -> _Hypotheses:
    """The `count` hypotheses of each row with the best scores, of all that are given, in descending order."""
    merged = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *hypotheses)
    return gather_beams(merged, jax.lax.top_k(merged.scores, count)[1])


def gather_beams(tree: Any, index: jax.Array) -> Any:
    """Entries index [B, m] of every array [B, n, ...]: [B, m, ...]."""
    return jax.tree.map(lambda x: jax.vmap(lambda row, index: row[index])(x, index), tree)
