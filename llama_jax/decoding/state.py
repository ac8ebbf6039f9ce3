"""Decoding as functions of a state: `prefill` a prompt, `step` a token, `advance` many.

One struct, `DecodeState`, holds all there is between two tokens, and `step` maps it to the next one;
`generate` and `stream` (in `generation`) are two loops around that function. A row's tokens depend on that
row alone: its prompt, its settings and its key, never on its batch mates or on padding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import kv_cache as kv
from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding import arguments, logits_processors
from llama_jax.decoding.arguments import EosId
from llama_jax.decoding.logits_processors import TokenHistory
from llama_jax.decoding.sampling import Sampling, choose
from llama_jax.model import Params, compute_dtype, forward_cached
from llama_jax.ops import spmd

# A prompt is read so many positions at a time, and its rest in the smaller pieces: the activations of one
# piece are all the memory that reading takes, however long the prompt.
PIECES = (256, 32)

Pick = Callable[[jax.Array, Sampling, jax.Array], jax.Array]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class GenerateOutput:
    """What `generate` returns; B counts every sequence, `num_return_sequences` of each prompt together.

    Attributes:
      tokens: int32 [B, max_new_tokens], 0 after a row's end.
      lengths: int32 [B], new tokens of each row, the end token included.
      logprobs: f32 [B, max_new_tokens], the model's log-probability of each token before any rule,
        temperature or filter (that of `forward`'s logits), 0 after a row's end.
      top_tokens: int32 [B, max_new_tokens, n], the likeliest tokens at each step, likeliest first; None
        unless `top_logprobs` asked for them.
      top_logprobs: f32 [B, max_new_tokens, n], theirs.
    """

    tokens: jax.Array
    lengths: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array | None = None
    top_logprobs: jax.Array | None = None


@chex.dataclass(frozen=True, mappable_dataclass=False)
class DecodeState:
    """Everything between two tokens.

    Attributes:
      cache: keys and values of all tokens but the last of each row's text.
      history: each row's tokens so far, its prompt and its continuation.
      token: int32 [B], the newest token; 0 in rows that had ended before it.
      count: int32 [], tokens chosen so far.
      limit: int32 [], how many may be chosen.
      done: bool [B], rows that have met an end token or the limit.
      output: the tokens chosen so far.
      keys: [B], one key a row; token t draws with `fold_in(key, t)`.
      sampling: settings of the next choice, one value a row.
      eos_ids: int32 [E], the end tokens; -1 for none.
    """

    cache: kv.KVCache
    history: TokenHistory
    token: jax.Array
    count: jax.Array
    limit: jax.Array
    done: jax.Array
    output: GenerateOutput
    keys: jax.Array
    sampling: Sampling
    eos_ids: jax.Array


def prefill(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int,
    eos_id: EosId = None,
    num_return_sequences: int = 1,
    top_logprobs: int = 0,
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> DecodeState:
    """Reads the prompts into a fresh cache and returns the state to `step` from.

    Each row's last token is left for the first step, so that one place chooses every token. Arguments
    are as for `generate`; nothing is bucketed or checked here.
    """
    batch, length = tokens.shape
    sampling = (Sampling() if sampling is None else sampling).rows(batch)
    dtype = compute_dtype(params) if cache_dtype is None else cache_dtype
    tokens = jnp.pad(jnp.asarray(tokens, jnp.int32), ((0, 0), (0, max_new_tokens)))
    return begin(
        config,
        params,
        kv.init_cache(config, batch, length + max_new_tokens, dtype),
        tokens,
        lengths,
        0,
        length - 1,
        key,
        sampling,
        arguments.end_ids(eos_id),
        max_new_tokens,
        new_tokens=max_new_tokens,
        num_return_sequences=num_return_sequences,
        top_logprobs=top_logprobs,
    )


def begin(
    config: LlamaConfig,
    params: Params,
    cache: kv.KVCache,
    tokens: jax.Array,
    lengths: jax.Array,
    start: int | jax.Array,
    stop: int | jax.Array,
    key: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    limit: int | jax.Array,
    *,
    new_tokens: int,
    num_return_sequences: int = 1,
    top_logprobs: int = 0,
) -> DecodeState:
    """`prefill` of a cache that may hold the beginning of the prompts.

    Args:
      config: the model.
      params: its parameters, unstacked.
      cache: S slots; those before `start` hold the prompts' first tokens.
      tokens: int32 [B, S], the prompts, whole.
      lengths: int32 [B], theirs.
      start: the first position to run.
      stop: the position after the last to run, `max(lengths) - 1` or more.
      key: as for `generate`.
      sampling: of one value a row (`Sampling.rows`).
      eos_ids: int32 [E].
      limit: how many tokens may be chosen, at most `new_tokens`.
      new_tokens: room for what is chosen; static, as are the two after it.
      num_return_sequences: continuations of each prompt.
      top_logprobs: how many of each step's likeliest tokens to keep.
    """
    batch, length = tokens.shape
    lengths = sharding.constrain(jnp.asarray(lengths, jnp.int32), sharding.ROWS_B)
    rows = P(sharding.BATCH, None)
    tokens = sharding.constrain(tokens, rows)
    # Padding may be anything, even an id outside the vocabulary, whose NaN would reach everyone.
    tokens = jnp.where(jnp.arange(length) < lengths[:, None], tokens, 0)
    cache = read_prompt(config, params, cache, tokens, start, stop)
    sampling = jax.tree.map(sharding.over_batch, sampling)
    text = TokenHistory(tokens, lengths, lengths)
    cache, text, sampling = jax.tree.map(
        lambda x: repeat_rows(x, num_return_sequences), (cache, text, sampling)
    )
    batch *= num_return_sequences

    def zeros(dtype: jax.typing.DTypeLike, *rest: int) -> jax.Array:
        shape = batch, new_tokens, *rest
        spec = sharding.out_sharding(P(*rows, *(None,) * len(rest)), shape)
        return jnp.zeros(shape, dtype, out_sharding=spec)

    return DecodeState(
        cache=cache,
        history=text,
        token=text.at(text.length - 1),
        count=jnp.zeros((), jnp.int32),
        limit=jnp.asarray(limit, jnp.int32),
        done=text.length < 1,
        output=GenerateOutput(
            tokens=zeros(jnp.int32),
            lengths=jnp.zeros_like(text.length),
            logprobs=zeros(jnp.float32),
            top_tokens=zeros(jnp.int32, top_logprobs) if top_logprobs else None,
            top_logprobs=zeros(jnp.float32, top_logprobs) if top_logprobs else None,
        ),
        keys=arguments.row_keys(key, batch),
        sampling=sampling,
        eos_ids=eos_ids,
    )


def read_prompt(
    config: LlamaConfig,
    params: Params,
    cache: kv.KVCache,
    tokens: jax.Array,
    start: int | jax.Array,
    stop: int | jax.Array,
) -> kv.KVCache:
    """Runs positions start..stop-1 of tokens int32 [B, S] against the cache, a piece at a time."""
    batch, length = tokens.shape

    def piece(size: int, first: int | jax.Array, index: jax.Array, cache: kv.KVCache) -> kv.KVCache:
        # Never past the end: the last piece may run again what the one before it ran, to the same effect.
        at = jnp.minimum(first + index * size, length - size).astype(jnp.int32)
        ids = jax.lax.dynamic_slice_in_dim(tokens, at, size, axis=1)
        rows = jnp.broadcast_to(at, (batch,))
        return forward_cached(config, params, ids, rows, cache, used=at + size)[1]

    cache = spmd.pvary_like(cache, params, tokens)
    large, small = (min(size, length) for size in PIECES)
    at_least: Any = max if isinstance(stop - start, int) else jnp.maximum
    # More than half a large piece is worth one.
    many = at_least((stop - start + large // 2 - 1) // large, 0) if large > small else 0
    rest = start + many * large
    few = at_least(-((rest - stop) // small), 0)
    for number, size, first in ((many, large, start), (few, small, rest)):
        if not isinstance(number, int) or number:
            cache = jax.lax.fori_loop(0, number, functools.partial(piece, size, first), cache)
    return cache


def repeat_rows(x: jax.Array, times: int) -> jax.Array:
    """[B, ...] -> [B * times, ...], each row `times` in a row."""
    if times == 1:
        return x
    layout = sharding.layout_of(x)
    wide = jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:]))
    rows = jnp.reshape(wide, (x.shape[0] * times, *x.shape[1:]), out_sharding=layout)
    # The product may divide the batch axes where the prompts do not.
    return rows if layout is None else sharding.constrain(rows, P(sharding.BATCH, *layout[1:]))


def decode_step(config: LlamaConfig, params: Params, state: DecodeState) -> DecodeState:
    """Feeds the last token to the model and chooses the next one.

    Args:
      config: the model.
      params: its parameters, unstacked (`unstack`), or every step copies all of them.
      state: from `prefill` or `step`. The cache must have a free slot: no more than `max_new_tokens`
        tokens may be chosen in all.

    Returns:
      The next state. Rows that are done keep their tokens and length.
    """
    last = state.history.length - 1
    logits, cache = forward_cached(config, params, state.history.at(last)[:, None], last, state.cache)
    logits = sharding.constrain(logits[:, 0], sharding.LOGITS_BV)
    state = take(dataclasses.replace(state, cache=cache), logits, ~state.done)
    return dataclasses.replace(state, count=state.count + 1)


def take(state: DecodeState, logits: jax.Array, live: jax.Array, pick: Pick = choose) -> DecodeState:
    """The state after some rows have chosen a token; its cache and `count` are left to the caller.

    Args:
      state: what the rows read so far.
      logits: f32 [B, V], the model's after each row's last token.
      live: bool [B], the rows that choose; none that is done.
      pick: how: ruled logits, settings and a key a row to a token each.
    """
    text, sampling, old = state.history, state.sampling, state.output
    keys = fold_each(state.keys, old.lengths)
    token = pick(logits_processors.apply(logits, sampling.processors(), text, state.eos_ids), sampling, keys)
    token = jnp.where(live, token, 0)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.arange(logits.shape[-1]) == token[:, None]  # a gather would not follow explicit sharding
    logprob = jnp.where(chosen, logits, 0.0).sum(-1) - normalizer
    here = (jnp.arange(old.tokens.shape[1]) == old.lengths[:, None]) & live[:, None]

    def put(name: str, value: jax.Array) -> jax.Array:
        at = here.reshape(here.shape + (1,) * (value.ndim - 1))
        return jnp.where(at, value[:, None], getattr(old, name))

    tops: dict[str, Any] = {}
    if old.top_tokens is not None:
        values, ids = jax.lax.top_k(logits, old.top_tokens.shape[-1])
        tops = {
            "top_tokens": put("top_tokens", ids),
            "top_logprobs": put("top_logprobs", values - normalizer[:, None]),
        }
    lengths = old.lengths + live
    ends = (token[:, None] == state.eos_ids).any(-1) | (lengths >= state.limit)
    return dataclasses.replace(
        state,
        history=text.append(token, live),
        token=token,
        done=state.done | (live & ends),
        output=GenerateOutput(
            tokens=put("tokens", token), lengths=lengths, logprobs=put("logprobs", logprob), **tops
        ),
    )


def fold_each(keys: jax.Array, counts: jax.Array) -> jax.Array:
    """`fold_in` of a number of its own, counts [B], into each of keys [B]."""
    layout = sharding.layout_of(keys)  # vmap wants the same of both
    return jax.vmap(jax.random.fold_in)(
        keys, counts if layout is None else sharding.constrain(counts, layout)
    )


def advance(config: LlamaConfig, params: Params, state: DecodeState, steps: int | jax.Array) -> DecodeState:
    """Takes up to `steps` steps, fewer if all rows end sooner."""
    # What a step makes of the state may vary over more mesh axes than a fresh one (inside shard_map).
    state = spmd.pvary_like(state, params)
    stop = state.count + steps
    return jax.lax.while_loop(
        lambda state: (state.count < stop) & ~jnp.all(state.done),
        lambda state: decode_step(config, params, state),
        state,
    )
