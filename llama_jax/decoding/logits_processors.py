"""Logits processors that depend on the token history: penalties, n-gram blocking, forced tokens, and so on.

Each maps logits f32 [B, V] (log-probabilities in beam search) to logits and takes its setting as an array
of one value per row, so no value recompiles anything. One that is off in every row is skipped at run time.
The order is that of Hugging Face transformers: repetition penalty, presence and frequency penalties,
n-grams, suppressed tokens, minimum length, forced tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import sharding
from llama_jax.ops import spmd


class TokenHistory(NamedTuple):
    """The tokens of each row so far.

    Attributes:
      tokens: int32 [B, C], the prompt, then the generated tokens; undefined after `length`.
      length: int32 [B], prompt and generated tokens.
      prompt_length: int32 [B].
    """

    tokens: jax.Array
    length: jax.Array
    prompt_length: jax.Array

    def seen(self, vocab_size: int) -> jax.Array:
        """bool [B, V]: the tokens that occur in prompt or continuation."""
        return _mark_ids(self.tokens, self._positions() < self.length[:, None], vocab_size)

    def counts(self, vocab_size: int) -> jax.Array:
        """int32 [B, V]: the occurrences of each token in the continuation, without the prompt."""
        positions = self._positions()
        generated = (positions < self.length[:, None]) & (positions >= self.prompt_length[:, None])
        ids = jnp.where(generated, self.tokens, vocab_size)
        zeros = _zeros(ids, vocab_size, jnp.int32)
        return jax.vmap(lambda row, ids: row.at[ids].add(1, mode="drop"))(zeros, ids)

    def append(self, token: jax.Array, live: jax.Array) -> TokenHistory:
        """Appends `token` [B] in the rows that are `live` [B]."""
        is_next = (self._positions() == self.length[:, None]) & live[:, None]
        return self._replace(
            tokens=jnp.where(is_next, token[:, None], self.tokens), length=self.length + live
        )

    def token_at(self, position: jax.Array) -> jax.Array:
        """int32 [B]: the token at `position` [B]; 0 outside the array."""
        return jnp.where(self._positions() == position[:, None], self.tokens, 0).sum(-1, dtype=jnp.int32)

    def _positions(self) -> jax.Array:
        return jnp.arange(self.tokens.shape[1])


class LogitsProcessors(NamedTuple):
    """The settings of all processors, one value per row; made by `Sampling.processors`, documented there."""

    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    no_repeat_ngram_size: jax.Array
    min_new_tokens: jax.Array
    suppress_tokens: jax.Array
    forced_tokens: jax.Array

    def any_active(self) -> jax.Array:
        """bool []: whether any processor is on in any row."""
        active = (self.repetition_penalty != 1) | (self.min_new_tokens > 0)
        for value in (self.presence_penalty, self.frequency_penalty, self.no_repeat_ngram_size):
            active |= value != 0
        ids = (self.suppress_tokens >= 0).any(-1) | (self.forced_tokens >= 0).any(-1)
        return jnp.any(active | ids)


def apply(
    logits: jax.Array, processors: LogitsProcessors, history: TokenHistory, eos_ids: jax.Array
) -> jax.Array:
    """Applies all processors in order.

    Args:
      logits: f32 [B, V].
      processors: their settings.
      history: the tokens of each row so far.
      eos_ids: int32 [E], the end-of-sequence ids; -1 for none.

    Returns:
      f32 [B, V], -inf for forbidden tokens.
    """

    def apply_all(
        logits: jax.Array, processors: LogitsProcessors, history: TokenHistory, eos_ids: jax.Array
    ) -> jax.Array:
        count = history.length - history.prompt_length
        logits = repetition_penalty(logits, history, processors.repetition_penalty)
        logits = presence_and_frequency_penalty(
            logits, history, processors.presence_penalty, processors.frequency_penalty
        )
        logits = no_repeat_ngram(logits, history, processors.no_repeat_ngram_size)
        logits = suppress(logits, processors.suppress_tokens)
        too_short = (count < processors.min_new_tokens)[:, None]
        logits = suppress(logits, jnp.where(too_short, eos_ids, -1))
        return force(logits, processors.forced_tokens, count)

    return apply_if(processors.any_active(), apply_all, logits, processors, history, eos_ids)


def apply_if(
    predicate: jax.Array, function: Callable[..., jax.Array], logits: jax.Array, *args: Any
) -> jax.Array:
    """`function(logits, *args)` where `predicate` [] holds; otherwise `logits`, without reading them.

    The predicate is evaluated at run time, so no setting recompiles anything. Under `vmap` over values that
    the predicate depends on, both branches are computed.
    """
    # Both branches of a cond must have the same type, varying mesh axes included.
    logits, *args = spmd.pvary_like((logits, *args))
    return jax.lax.cond(predicate, function, lambda logits, *_: logits, logits, *args)


def repetition_penalty(logits: jax.Array, history: TokenHistory, penalty: jax.Array) -> jax.Array:
    """Divides positive and multiplies negative logits of tokens in the history by `penalty` [B]; 1 is off."""

    def penalize(logits: jax.Array, history: TokenHistory, penalty: jax.Array) -> jax.Array:
        scaled = jnp.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])
        return jnp.where(history.seen(logits.shape[-1]), scaled, logits)

    return apply_if(jnp.any(penalty != 1), penalize, logits, history, penalty)


def presence_and_frequency_penalty(
    logits: jax.Array, history: TokenHistory, presence: jax.Array, frequency: jax.Array
) -> jax.Array:
    """logits - presence [B] * (counts > 0) - frequency [B] * counts, counts of generated tokens."""

    def penalize(
        logits: jax.Array, history: TokenHistory, presence: jax.Array, frequency: jax.Array
    ) -> jax.Array:
        counts = history.counts(logits.shape[-1])
        return logits - presence[:, None] * (counts > 0) - frequency[:, None] * counts

    return apply_if(
        jnp.any((presence != 0) | (frequency != 0)), penalize, logits, history, presence, frequency
    )


def no_repeat_ngram(logits: jax.Array, history: TokenHistory, size: jax.Array) -> jax.Array:
    """Forbids tokens that would repeat an n-gram of `size` [B] tokens from the history; 0 is off.

    A row in which this would forbid every token is left as it is.
    """

    def block(logits: jax.Array, history: TokenHistory, size: jax.Array) -> jax.Array:
        positions = jnp.arange(history.tokens.shape[1])
        valid = (positions < history.length[:, None]) & (positions >= size[:, None] - 1)

        def compare(offset: jax.Array, matches: jax.Array) -> jax.Array:
            # tokens[i - offset] with the history's token `offset` places before the next one
            recent = history.token_at(history.length - offset)[:, None]
            equal = jnp.roll(history.tokens, offset, axis=1) == recent
            return matches & (equal | (offset >= size)[:, None])

        matches = valid & (size > 0)[:, None]
        matches = jax.lax.fori_loop(1, jnp.maximum(jnp.max(size), 1), compare, matches)
        matches &= (history.length >= size)[:, None]
        forbidden = _mark_ids(history.tokens, matches, logits.shape[-1])
        any_left = (~forbidden & (logits > -jnp.inf)).any(-1, keepdims=True)
        return jnp.where(forbidden & any_left, -jnp.inf, logits)

    return apply_if(jnp.any(size > 0), block, logits, history, size)


def suppress(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """-inf for the tokens `ids` [B, I]; negative ids are padding."""

    def mask(logits: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.where(_mark_ids(ids, ids >= 0, logits.shape[-1]), -jnp.inf, logits)

    return apply_if(jnp.any(ids >= 0), mask, logits, ids)


def force(logits: jax.Array, ids: jax.Array, count: jax.Array) -> jax.Array:
    """-inf for all but ids[b, count], where `count` [B] tokens are generated; negative ids force nothing."""
    forced = jnp.where(jnp.arange(ids.shape[1]) == count[:, None], ids, -1).max(-1, initial=-1)[:, None]

    def mask(logits: jax.Array, forced: jax.Array) -> jax.Array:
        one_hot = jnp.where(jnp.arange(logits.shape[-1]) == forced, 0.0, -jnp.inf)
        return jnp.where(forced >= 0, one_hot, logits)

    return apply_if(jnp.any(forced >= 0), mask, logits, forced)


def _mark_ids(ids: jax.Array, valid: jax.Array, vocab_size: int) -> jax.Array:
    """bool [B, V]: the tokens among ids [B, I] where `valid` [B, I]."""
    ids = jnp.where(valid, ids, vocab_size)  # out of range: dropped by the scatter
    zeros = _zeros(ids, vocab_size, bool)
    return jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(zeros, ids)


def _zeros(like: jax.Array, vocab_size: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Zeros [B, V] with the sharding of logits."""
    shape = like.shape[0], vocab_size
    spec = sharding.out_sharding(sharding.LOGITS_BV, shape)
    return spmd.pvary_like(jnp.zeros(shape, dtype, out_sharding=spec), like)
