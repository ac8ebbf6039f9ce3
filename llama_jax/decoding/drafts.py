"""Sources of draft tokens for speculative decoding: the token history itself, or a smaller model."""

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
from llama_jax.decoding import arguments, constraints, logits_processors
from llama_jax.decoding.logits_processors import TokenHistory
from llama_jax.decoding.sampling import argmax, categorical, is_greedy, transform
from llama_jax.decoding.state import DecodeState, fold_in_rows, prefill_cache
from llama_jax.errors import InputError
from llama_jax.model import Params, compute_dtype, forward_cached, unstack
from llama_jax.ops import spmd

# Token t of a row has the key fold_in(key, t); its draft is sampled with this folded into that key.
DRAFT_SALT = 1


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["max_ngram", "min_ngram"])
@dataclasses.dataclass(frozen=True)
class PromptLookup:
    """Drafts are copied from the token history: what followed the last n-gram where it occurred before.

    Attributes:
      max_ngram: the longest n-gram to look for. The longest match counts, and of several the latest.
      min_ngram: the shortest. Without a match nothing is drafted: verifying drafts takes time on a CPU, and
        what followed a single token seldom follows it again.
    """

    max_ngram: int = 3
    min_ngram: int = 2


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class DraftModel:
    """Drafts are sampled from a smaller model of the same vocabulary, with the same settings.

    Attributes:
      config: the smaller model.
      params: its parameters, preferably unstacked.
    """

    config: LlamaConfig
    params: Params


Draft = PromptLookup | DraftModel


class Drafts(NamedTuple):
    """The draft tokens of a round.

    Attributes:
      tokens: int32 [B, K], followed by -1 where there are fewer.
      probabilities: f32 [K, B, V], the distribution that each was sampled from; None for prompt lookup.
    """

    tokens: jax.Array
    probabilities: jax.Array | None = None


def check_draft(config: LlamaConfig, draft: Any, lengths: Any, max_new_tokens: int) -> None:
    """Checks that `draft` can draft for a model, and that its context holds prompts of known lengths.

    Raises:
      InputError: if not.
    """
    if isinstance(draft, PromptLookup):
        min_ngram = arguments.check_int("min_ngram", draft.min_ngram)
        if arguments.check_int("max_ngram", draft.max_ngram) < min_ngram:
            raise InputError(
                f"max_ngram is {draft.max_ngram} and min_ngram {min_ngram}; the first must not be smaller"
            )
        return
    if not isinstance(draft, DraftModel):
        raise InputError(f"draft is a {type(draft).__name__}; it must be a PromptLookup or a DraftModel")
    if draft.config.vocab_size != config.vocab_size:
        raise InputError(
            f"the draft model has a vocabulary of {draft.config.vocab_size} and the model one of "
            f"{config.vocab_size}; they must be the same"
        )
    counts = arguments.concrete(lengths)
    context = draft.config.max_position_embeddings
    if counts is not None and counts.max() + max_new_tokens > context:
        raise InputError(
            f"the prompt's {counts.max()} tokens and max_new_tokens {max_new_tokens} need "
            f"{counts.max() + max_new_tokens} positions; the draft model's context has {context}: shorten "
            "one of them, or use PromptLookup"
        )


def prefill_draft(
    draft: Draft,
    history: TokenHistory,
    stop: jax.Array,
    capacity: int,
    dtype: jax.typing.DTypeLike | None,
    run_length: int,
) -> kv.KVCache | None:
    """The draft model's cache of `capacity` slots after positions 0..stop-1 of the prompts."""
    if not isinstance(draft, DraftModel):
        return None
    params = unstack(draft.params)
    batch, dtype = history.tokens.shape[0], dtype or compute_dtype(params)
    cache = kv.init_cache(draft.config, batch, capacity, dtype, run_length=run_length)
    return prefill_cache(draft.config, params, cache, history.tokens, 0, stop, history.length)


def propose(
    draft: Draft, cache: kv.KVCache | None, state: DecodeState, count: int
) -> tuple[Drafts, kv.KVCache | None]:
    """Up to `count` drafts per row: none for rows that are done, and none for a row's last possible token.

    Args:
      draft: their source.
      cache: the draft model's; it may lack the last two tokens of a row. None for prompt lookup.
      state: the rows so far.
      count: K.

    Returns:
      The drafts, and the cache with all of them but the last.
    """
    useful = jnp.where(state.done, 0, state.limit - state.output.lengths - 1)
    if isinstance(draft, DraftModel):
        drafts, cache = _propose_from_model(draft, cache, state, count, jnp.max(useful))
    else:
        drafts = Drafts(prompt_lookup(state.history, draft, count))
    return drafts._replace(tokens=jnp.where(jnp.arange(count) < useful[:, None], drafts.tokens, -1)), cache


def prompt_lookup(history: TokenHistory, lookup: PromptLookup, count: int) -> jax.Array:
    """Drafts from the token history.

    A copy that reaches the end of the history continues with its own tokens: `a b a b` gives `a b a`.

    Args:
      history: the tokens of each row so far.
      lookup: n-gram sizes.
      count: K.

    Returns:
      int32 [B, K]; -1 in rows without a match.
    """
    batch, columns = history.tokens.shape
    positions, last = jnp.arange(columns), history.length[:, None] - 1

    def compare(offset: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        matches, match_length = carry
        recent = history.token_at(history.length - 1 - offset)[:, None]
        equal = jnp.roll(history.tokens, offset, axis=1) == recent
        matches &= equal & (positions >= offset)
        return matches, match_length + matches

    earlier = jnp.broadcast_to(positions, (batch, columns)) < last
    init = earlier, jnp.zeros_like(history.tokens)
    _, match_length = jax.lax.fori_loop(0, min(lookup.max_ngram, columns), compare, init)
    longest = match_length.max(-1, keepdims=True)
    is_match = (match_length == longest) & (longest >= lookup.min_ngram)
    end = jnp.where(is_match, positions, -1).max(-1, keepdims=True)
    # Columns to copy from [B, K]; past the last token they restart after the match.
    source = end + 1 + jnp.arange(count) % jnp.maximum(last - end, 1)
    one_hot = source[..., None] == positions
    copied = jnp.where(one_hot, history.tokens[:, None], 0).sum(-1, dtype=jnp.int32)
    return jnp.where(end >= 0, copied, -1)


def _propose_from_model(
    draft: DraftModel, cache: kv.KVCache | None, state: DecodeState, count: int, useful: jax.Array
) -> tuple[Drafts, kv.KVCache | None]:
    """Drafts from the draft model, only the first `useful` [] of them."""
    params, sampling = unstack(draft.params), state.sampling
    greedy = is_greedy(sampling)

    def draft_token(index: jax.Array, carry: Any) -> Any:
        history, cache, drafts, constraint = carry
        last = history.length - 1
        # Two tokens: after a round that accepted every draft, the cache lacks the last but one too.
        start = jnp.maximum(last - 1, 0)
        tokens = jnp.stack([history.token_at(start), history.token_at(start + 1)], axis=1)
        logits, cache = forward_cached(draft.config, params, tokens, start, cache)
        logits = sharding.constrain(logits, P(sharding.BATCH, None, None))
        logits = jnp.where((last > start)[:, None], logits[:, 1], logits[:, 0])
        processed = logits_processors.apply(logits, sampling.processors(), history, state.eos_ids)
        if constraint is not None:
            processed = constraints.mask(constraint, processed, logits, state.eos_ids)
        logits = processed
        most_likely = argmax(logits)
        keys = fold_in_rows(state.keys, state.output.lengths + index)

        def sample_random(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = transform(logits, sampling)
            token = categorical(logits, jax.vmap(jax.random.fold_in, (0, None))(keys, DRAFT_SALT))
            return jnp.where(greedy, most_likely, token), jax.nn.softmax(logits)

        take_argmax = lambda logits: (most_likely, jnp.zeros_like(logits))  # noqa: E731
        token, q = jax.lax.cond(jnp.all(greedy), take_argmax, sample_random, logits)
        write = jax.lax.dynamic_update_index_in_dim
        drafts = Drafts(write(drafts.tokens, token, index, 1), write(drafts.probabilities, q, index, 0))
        if constraint is not None:
            constraint = constraints.advance(constraint, token)
        return history.append(token, token >= 0), cache, drafts, constraint

    def full(value: Any, shape: tuple[int, ...], spec: P) -> jax.Array:
        return jnp.full(shape, value, value.dtype, out_sharding=sharding.out_sharding(spec, shape))

    batch = state.done.shape[0]
    drafts = Drafts(
        full(np.int32(-1), (batch, count), P(sharding.BATCH, None)),
        full(np.float32(0), (count, batch, draft.config.vocab_size), P(None, sharding.BATCH, None)),
    )
    carry = spmd.pvary_like((state.history, cache, drafts, state.constraint), params, state)
    _, cache, drafts, _ = jax.lax.fori_loop(0, jnp.clip(useful, 0, count), draft_token, carry)
    return drafts, cache
