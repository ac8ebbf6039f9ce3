"""Rules on the next token that go by the text so far: penalties, bans and forced tokens.

Each maps logits f32 [B, V] (or log-probabilities, in beam search) to logits, and takes its setting as an
array of one value a row, so no value ever recompiles anything. Repetition penalty, presence and frequency
penalties, n-grams, bans, end tokens too early, forced tokens: Hugging Face's order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llama_jax import sharding
from llama_jax.ops import spmd


class TokenHistory(NamedTuple):
    """What each row reads so far.

    Attributes:
      tokens: int32 [B, C], the prompt and then what was chosen; anything after `length`.
      length: int32 [B], tokens in all.
      prompt_length: int32 [B], how many of them are the prompt.
    """

    tokens: jax.Array
    length: jax.Array
    prompt_length: jax.Array

    def seen(self, vocabulary: int) -> jax.Array:
        """bool [B, V]: the tokens that stand anywhere in the text."""
        return _mark(self.tokens, self._at() < self.length[:, None], vocabulary)

    def counts(self, vocabulary: int) -> jax.Array:
        """int32 [B, V]: how often each token was chosen, the prompt not counted."""
        chosen = (self._at() < self.length[:, None]) & (self._at() >= self.prompt_length[:, None])
        ids = jnp.where(chosen, self.tokens, vocabulary)
        zeros = _zeros(ids, vocabulary, jnp.int32)
        return jax.vmap(lambda row, ids: row.at[ids].add(1, mode="drop"))(zeros, ids)

    def append(self, token: jax.Array, live: jax.Array) -> TokenHistory:
        """The text with `token` [B] after it in the rows that are `live` [B]."""
        here = (self._at() == self.length[:, None]) & live[:, None]
        return self._replace(tokens=jnp.where(here, token[:, None], self.tokens), length=self.length + live)

    def at(self, position: jax.Array) -> jax.Array:
        """int32 [B]: the token at `position` [B]; 0 outside the text's array."""
        return jnp.where(self._at() == position[:, None], self.tokens, 0).sum(-1, dtype=jnp.int32)

    def _at(self) -> jax.Array:
        return jnp.arange(self.tokens.shape[1])


class LogitsProcessors(NamedTuple):
    """The settings of every rule, one row each; see `Sampling`, which makes it."""

    repetition_penalty: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    no_repeat_ngram_size: jax.Array
    min_new_tokens: jax.Array
    suppress_tokens: jax.Array
    forced_tokens: jax.Array

    def on(self) -> jax.Array:
        """bool []: whether any rule of any row does anything."""
        numbers = (self.presence_penalty, self.frequency_penalty, self.no_repeat_ngram_size)
        active = (self.repetition_penalty != 1) | (self.min_new_tokens > 0)
        for number in numbers:
            active |= number != 0
        ids = (self.suppress_tokens >= 0).any(-1) | (self.forced_tokens >= 0).any(-1)
        return jnp.any(active | ids)


def apply(logits: jax.Array, rules: LogitsProcessors, text: TokenHistory, eos_ids: jax.Array) -> jax.Array:
    """Every rule in order.

    Args:
      logits: f32 [B, V].
      rules: settings of each row.
      text: what the rows read so far.
      eos_ids: int32 [E], the end tokens; -1 for none.

    Returns:
      f32 [B, V], -inf for what a rule forbids.
    """

    def process(
        logits: jax.Array, rules: LogitsProcessors, text: TokenHistory, eos_ids: jax.Array
    ) -> jax.Array:
        new = text.length - text.prompt_length
        logits = repetition_penalty(logits, text, rules.repetition_penalty)
        logits = presence_and_frequency(logits, text, rules.presence_penalty, rules.frequency_penalty)
        logits = no_repeat_ngram(logits, text, rules.no_repeat_ngram_size)
        logits = ban(logits, rules.suppress_tokens)
        early = (new < rules.min_new_tokens)[:, None]
        logits = ban(logits, jnp.where(early, eos_ids, -1))
        return force(logits, rules.forced_tokens, new)

    return apply_if(rules.on(), process, logits, rules, text, eos_ids)


def apply_if(
    predicate: jax.Array, function: Callable[..., jax.Array], logits: jax.Array, *args: Any
) -> jax.Array:
    """`function(logits, *args)` where `predicate` [] holds; otherwise `logits`, without reading them.

    The predicate is evaluated at run time, so no setting recompiles. Under `vmap` over what the predicate
    depends on, both are computed.
    """
    # The two branches of a cond must agree in type, varying mesh axes included.
    logits, *args = spmd.pvary_like((logits, *args))
    return jax.lax.cond(predicate, function, lambda logits, *_: logits, logits, *args)


def repetition_penalty(logits: jax.Array, text: TokenHistory, penalty: jax.Array) -> jax.Array:
    """Makes tokens of the text less likely by `penalty` [B] (above 1) or likelier (below)."""

    def apply(logits: jax.Array, text: TokenHistory, penalty: jax.Array) -> jax.Array:
        scaled = jnp.where(logits > 0, logits / penalty[:, None], logits * penalty[:, None])
        return jnp.where(text.seen(logits.shape[-1]), scaled, logits)

    return apply_if(jnp.any(penalty != 1), apply, logits, text, penalty)


def presence_and_frequency(
    logits: jax.Array, text: TokenHistory, presence: jax.Array, frequency: jax.Array
) -> jax.Array:
    """logits - presence [B] * (counts > 0) - frequency [B] * counts, counts of generated tokens."""

    def apply(logits: jax.Array, text: TokenHistory, presence: jax.Array, frequency: jax.Array) -> jax.Array:
        counts = text.counts(logits.shape[-1])
        return logits - presence[:, None] * (counts > 0) - frequency[:, None] * counts

    return apply_if(jnp.any((presence != 0) | (frequency != 0)), apply, logits, text, presence, frequency)


def no_repeat_ngram(logits: jax.Array, text: TokenHistory, size: jax.Array) -> jax.Array:
    """Bans what would complete a sequence of `size` [B] tokens that the text holds already; 0 for none.

    A ban that would leave a row no token at all is not applied.
    """

    def apply(logits: jax.Array, text: TokenHistory, size: jax.Array) -> jax.Array:
        places = jnp.arange(text.tokens.shape[1])
        inside = (places < text.length[:, None]) & (places >= size[:, None] - 1) & (size > 0)[:, None]

        def compare(back: jax.Array, same: jax.Array) -> jax.Array:
            # tokens[i - back] against the text's own token `back` before the one to come
            agrees = jnp.roll(text.tokens, back, axis=1) == text.at(text.length - back)[:, None]
            return same & (agrees | (back >= size)[:, None])

        completes = jax.lax.fori_loop(1, jnp.maximum(jnp.max(size), 1), compare, inside)
        banned = _mark(text.tokens, completes & (text.length >= size)[:, None], logits.shape[-1])
        left = (~banned & (logits > -jnp.inf)).any(-1, keepdims=True)
        return jnp.where(banned & left, -jnp.inf, logits)

    return apply_if(jnp.any(size > 0), apply, logits, text, size)


def ban(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """-inf for the tokens `ids` [B, I]; those below 0 are nobody's."""

    def apply(logits: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.where(_mark(ids, ids >= 0, logits.shape[-1]), -jnp.inf, logits)

    return apply_if(jnp.any(ids >= 0), apply, logits, ids)


def force(logits: jax.Array, ids: jax.Array, count: jax.Array) -> jax.Array:
    """Leaves token number `count` [B] no choice but ids[b, count], where that is there and not below 0."""
    wanted = jnp.where(jnp.arange(ids.shape[1]) == count[:, None], ids, -1).max(-1, initial=-1)[:, None]

    def apply(logits: jax.Array, wanted: jax.Array) -> jax.Array:
        only = jnp.where(jnp.arange(logits.shape[-1]) == wanted, 0.0, -jnp.inf)
        return jnp.where(wanted >= 0, only, logits)

    return apply_if(jnp.any(wanted >= 0), apply, logits, wanted)


def _mark(ids: jax.Array, counts: jax.Array, vocabulary: int) -> jax.Array:
    """bool [B, V]: the tokens among ids [B, I] whose entry `counts` [B, I]."""
    ids = jnp.where(counts, ids, vocabulary)  # past the end, where the scatter drops it
    zeros = _zeros(ids, vocabulary, bool)
    return jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(zeros, ids)


def _zeros(like: jax.Array, vocabulary: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Zeros [B, V] laid out over a mesh as logits are."""
    shape = like.shape[0], vocabulary
    spec = sharding.out_sharding(sharding.LOGITS_BV, shape)
    return spmd.pvary_like(jnp.zeros(shape, dtype, out_sharding=spec), like)
