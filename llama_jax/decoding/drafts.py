"""Where speculative decoding's drafts come from: the text itself, or a smaller model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax import kv_cache as kv
from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding import arguments, logits_processors
from llama_jax.decoding.logits_processors import TokenHistory
from llama_jax.decoding.sampling import argmax, draw, is_greedy, transform
from llama_jax.decoding.state import DecodeState, fold_each, read_prompt
from llama_jax.errors import InputError
from llama_jax.model import Params, compute_dtype, forward_cached, unstack
from llama_jax.ops import spmd

# Token t of a row is chosen by its key fold_in(key, t); this is folded into that key to draw its draft.
DRAFTING = 1


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["max_ngram", "min_ngram"])
@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts are copied from the text: what followed its last tokens where they came before.

    Attributes:
      max_ngram: how many last tokens to look for; where they did not come before, fewer. The longest match
        counts, and of several the latest.
      min_ngram: how few may match. Where fewer do, nothing is drafted: judging drafts takes time on a CPU,
        and what followed a single token seldom follows it again.
    """

    max_ngram: int = 3
    min_ngram: int = 2


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Drafts come from a smaller model with the same vocabulary, under the same settings.

    Attributes:
      config: the smaller model.
      params: its parameters, preferably unstacked.
    """

    config: LlamaConfig
    params: Params


Draft = PromptLookup | DraftModel


class Drafts(NamedTuple):
    """What a round is to judge.

    Attributes:
      tokens: int32 [B, K], the drafts, and -1 after them.
      probabilities: f32 [K, B, V], what each was drawn from; None if that was no draw.
    """

    tokens: jax.Array
    probabilities: jax.Array | None = None


def check(config: LlamaConfig, draft: Any, lengths: Any, max_new_tokens: int) -> None:
    """Checks that `draft` can draft for a model, as far as its context goes for prompts of known lengths.

    Raises:
      InputError: if not.
    """
    if isinstance(draft, PromptLookup):
        least = arguments.whole_number("min_ngram", draft.min_ngram)
        if arguments.whole_number("max_ngram", draft.max_ngram) < least:
            raise InputError(
                f"max_ngram is {draft.max_ngram} and min_ngram {least}; the first must not be smaller"
            )
        return
    if not isinstance(draft, DraftModel):
        raise InputError(f"draft is a {type(draft).__name__}; it must be a PromptLookup or a DraftModel")
    if draft.config.vocab_size != config.vocab_size:
        raise InputError(
            f"the draft model has a vocabulary of {draft.config.vocab_size} and the model one of "
            f"{config.vocab_size}; they must be the same"
        )
    known = arguments.known(lengths)
    context = draft.config.max_position_embeddings
    if known is not None and known.max() + max_new_tokens > context:
        raise InputError(
            f"the prompt's {known.max()} tokens and max_new_tokens {max_new_tokens} need "
            f"{known.max() + max_new_tokens} positions; the draft model's context has {context}: shorten one "
            "of them, or draft by PromptLookup"
        )


def read(
    draft: Draft, tokens: jax.Array, stop: jax.Array, room: int, dtype: jax.typing.DTypeLike | None
) -> kv.KVCache | None:
    """The draft model's cache, of `room` slots, after positions 0..stop-1 of tokens int32 [B, C]."""
    if not isinstance(draft, DraftModel):
        return None
    params = unstack(draft.params)
    cache = kv.init_cache(draft.config, tokens.shape[0], room, dtype or compute_dtype(params))
    return read_prompt(draft.config, params, cache, tokens, 0, stop)


def following(
    draft: Draft, cache: kv.KVCache | None, state: DecodeState, count: int
) -> tuple[Drafts, kv.KVCache | None]:
    """Up to `count` drafts a row: none for rows that are done, and none for the last token of any.

    Args:
      draft: where they come from.
      cache: the draft model's; it holds all tokens but the last two of each text, or more. None for lookup.
      state: what they are to follow.
      count: K.

    Returns:
      the drafts, and the cache with all of them but the last.
    """
    useful = jnp.where(state.done, 0, state.limit - state.output.lengths - 1)
    if isinstance(draft, DraftModel):
        drafts, cache = _from_model(draft, cache, state, count, jnp.max(useful))
    else:
        drafts = Drafts(look_up(state.history, draft, count))
    return drafts._replace(tokens=jnp.where(jnp.arange(count) < useful[:, None], drafts.tokens, -1)), cache


def look_up(text: TokenHistory, lookup: PromptLookup, count: int) -> jax.Array:
    """Drafts from the text itself.

    A copy that reaches the text's end goes on with what it has copied itself: after `a b a b` comes `a b a`.

    Args:
      text: what the rows read so far.
      lookup: how many tokens must agree.
      count: K.

    Returns:
      int32 [B, K]; -1 in rows where too few tokens agree anywhere.
    """
    batch, room = text.tokens.shape
    places, last = jnp.arange(room), text.length[:, None] - 1

    def compare(back: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        same, run = carry
        agrees = jnp.roll(text.tokens, back, axis=1) == text.at(text.length - 1 - back)[:, None]
        same &= agrees & (places >= back)
        return same, run + same

    earlier = jnp.broadcast_to(places, (batch, room)) < last
    start = earlier, jnp.zeros_like(text.tokens)
    _, run = jax.lax.fori_loop(0, min(lookup.max_ngram, room), compare, start)
    best = run.max(-1, keepdims=True)
    end = jnp.where((run == best) & (best >= lookup.min_ngram), places, -1).max(-1, keepdims=True)
    # What to copy, [B, K]; past the last token it starts again after the match.
    source = end + 1 + jnp.arange(count) % jnp.maximum(last - end, 1)
    copied = jnp.where(source[..., None] == places, text.tokens[:, None], 0).sum(-1, dtype=jnp.int32)
    return jnp.where(end >= 0, copied, -1)


def _from_model(
    draft: DraftModel, cache: kv.KVCache | None, state: DecodeState, count: int, useful: jax.Array
) -> tuple[Drafts, kv.KVCache | None]:
    """Drafts from the draft model, the first `useful` [] of them alone."""
    params, sampling = unstack(draft.params), state.sampling
    greedy = is_greedy(sampling)

    def propose(index: jax.Array, carry: Any) -> Any:
        text, cache, drafts = carry
        last = text.length - 1
        # After a round that accepted everything, the cache has not seen the last token but one either.
        start = jnp.maximum(last - 1, 0)
        tokens = jnp.stack([text.at(start), text.at(start + 1)], axis=1)
        logits, cache = forward_cached(draft.config, params, tokens, start, cache)
        logits = sharding.constrain(logits, P(sharding.BATCH, None, None))
        logits = jnp.where((last > start)[:, None], logits[:, 1], logits[:, 0])
        logits = logits_processors.apply(logits, sampling.processors(), text, state.eos_ids)
        likeliest = argmax(logits)
        keys = fold_each(state.keys, state.output.lengths + index)

        def random(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = transform(logits, sampling)
            drawn = draw(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, DRAFTING))
            return jnp.where(greedy, likeliest, drawn), jax.nn.softmax(logits)

        certain = lambda logits: (likeliest, jnp.zeros_like(logits))  # noqa: E731
        token, q = jax.lax.cond(jnp.all(greedy), certain, random, logits)
        put = jax.lax.dynamic_update_index_in_dim
        drafts = Drafts(put(drafts.tokens, token, index, 1), put(drafts.probabilities, q, index, 0))
        return text.append(token, token >= 0), cache, drafts

    def full(value: Any, shape: tuple[int, ...], spec: P) -> jax.Array:
        return jnp.full(shape, value, value.dtype, out_sharding=sharding.out_sharding(spec, shape))

    batch = state.done.shape[0]
    drafts = Drafts(
        full(np.int32(-1), (batch, count), P(sharding.BATCH, None)),
        full(np.float32(0), (count, batch, draft.config.vocab_size), P(None, sharding.BATCH, None)),
    )
    carry = spmd.pvary_like((state.history, cache, drafts), params, state)
    _, cache, drafts = jax.lax.fori_loop(0, jnp.clip(useful, 0, count), propose, carry)
    return drafts, cache
