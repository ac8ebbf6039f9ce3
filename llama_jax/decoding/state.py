"""Decoding as functions of a state: `prefill` a prompt, `decode_step` for one token, `decode_loop` for many.

`DecodeState` holds everything between two tokens, and `decode_step` maps it to the next state; `generate`
and `stream` (in `generation`) are two loops around that function. A row's tokens depend on that row alone:
its prompt, its settings and its key, not on the rest of the batch or on padding.
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
from llama_jax.decoding import arguments, constraints, logits_processors
from llama_jax.decoding.arguments import EosId
from llama_jax.decoding.constraints import Constraint
from llama_jax.decoding.logits_processors import TokenHistory
from llama_jax.decoding.sampling import Sampling, sample
from llama_jax.model import Params, compute_dtype, forward_cached
from llama_jax.ops import spmd, striped_cache
from llama_jax.ops.inputs import as_array

# Chunk sizes of a prefill: large chunks first, the rest in small ones. Activation memory is that of one
# chunk, whatever the prompt's length. On a mesh, `context` divides a chunk: each device has this many tokens.
PREFILL_CHUNKS = (256, 32)

# (processed logits f32 [B, V], settings, keys [B]) -> token int32 [B]
Sampler = Callable[[jax.Array, Sampling, jax.Array], jax.Array]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class GenerateOutput:
    """The result of `generate`; B is the number of prompts times `num_return_sequences`.

    Attributes:
      tokens: int32 [B, max_new_tokens], 0 after the end of a row.
      lengths: int32 [B], generated tokens of each row, the end-of-sequence token included.
      logprobs: f32 [B, max_new_tokens], the model's log-probability of each token before any logits
        processor, temperature or filter (that of `forward`'s logits), 0 after the end of a row.
      top_tokens: int32 [B, max_new_tokens, n], the most likely tokens of each step, in descending order;
        None unless `top_logprobs` is given.
      top_logprobs: f32 [B, max_new_tokens, n], their log-probabilities.
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
      cache: keys and values of every token but the last of each row.
      history: the tokens of each row, prompt and continuation.
      token: int32 [B], the newest token; 0 in rows that had ended before it.
      count: int32 [], steps taken so far.
      limit: int32 [], the maximum number of generated tokens.
      done: bool [B], rows that have reached an end-of-sequence token or the limit.
      output: the generated tokens so far.
      keys: [B], one key per row; token t is sampled with `fold_in(key, t)`.
      sampling: settings, one value per row.
      eos_ids: int32 [E], the end-of-sequence ids; -1 for none.
      constraint: the rows' grammars and where each row is in its own; None without any.
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
    constraint: Constraint | None = None


def prefill(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: Sampling | None = None,
    *,
    max_new_tokens: int,
    cache_dtype: jax.typing.DTypeLike | None = None,
    eos_id: EosId = None,
    num_return_sequences: int = 1,
    top_logprobs: int = 0,
    constraint: Constraint | None = None,
) -> DecodeState:
    """Runs the prompts through the model into a new cache; returns the state for `decode_step`.

    Each row's last token is left for the first step, so that every token is sampled in one place. Arguments
    are those of `generate`, with its grammars as a `Constraint` (`constraints.for_rows`); they are neither
    checked nor padded to a bucket here.
    """
    tokens, lengths = as_array("tokens", tokens), as_array("lengths", lengths)
    batch, length = tokens.shape
    sampling = (Sampling() if sampling is None else sampling).broadcast(batch)
    dtype = compute_dtype(params) if cache_dtype is None else cache_dtype
    tokens = jnp.pad(jnp.asarray(tokens, jnp.int32), ((0, 0), (0, max_new_tokens)))
    return init_state(
        config,
        params,
        kv.init_cache(config, batch, length + max_new_tokens, dtype),
        tokens,
        lengths,
        0,
        length - 1,
        key,
        sampling,
        arguments.pad_eos_ids(eos_id),
        max_new_tokens,
        constraint,
        new_tokens=max_new_tokens,
        num_return_sequences=num_return_sequences,
        top_logprobs=top_logprobs,
    )


def init_state(
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
    constraint: Constraint | None = None,
    *,
    new_tokens: int,
    num_return_sequences: int = 1,
    top_logprobs: int = 0,
) -> DecodeState:
    """`prefill` with a given cache, which may already hold a common prefix of the prompts.

    Args:
      config: the model.
      params: its parameters, unstacked.
      cache: S slots; those before `start` hold the prompts' first tokens.
      tokens: int32 [B, S], the whole prompts.
      lengths: int32 [B].
      start: the first position to run.
      stop: the position after the last to run, at least `max(lengths) - 1`.
      key: as for `generate`.
      sampling: settings, one value per row (`Sampling.broadcast`).
      eos_ids: int32 [E].
      limit: the maximum number of generated tokens, at most `new_tokens`.
      constraint: the rows' grammars.
      new_tokens: columns of the output. Static, like the next two.
      num_return_sequences: continuations of each prompt.
      top_logprobs: the number of most likely tokens to return per step.
    """
    batch, length = tokens.shape
    lengths = sharding.constrain(jnp.asarray(lengths, jnp.int32), sharding.ROWS_B)
    tokens = sharding.constrain(tokens, P(sharding.BATCH, None))
    # Padding may hold an id outside the vocabulary, whose embedding is NaN and would spread to every row.
    tokens = jnp.where(jnp.arange(length) < lengths[:, None], tokens, 0)
    cache = prefill_cache(config, params, cache, tokens, start, stop, lengths)
    sampling = jax.tree.map(sharding.over_batch, sampling)
    history = TokenHistory(tokens, lengths, lengths)
    cache, history, sampling = jax.tree.map(
        lambda x: repeat_rows(x, num_return_sequences), (cache, history, sampling)
    )
    if constraint is not None:
        constraint = constraints.over_mesh(constraint)
        index, at = (repeat_rows(x, num_return_sequences) for x in (constraint.index, constraint.state))
        constraint = dataclasses.replace(constraint, index=index, state=at)
    batch *= num_return_sequences

    def zeros(dtype: jax.typing.DTypeLike, *rest: int) -> jax.Array:
        shape = batch, new_tokens, *rest
        spec = sharding.out_sharding(P(sharding.BATCH, *(None,) * (len(shape) - 1)), shape)
        return jnp.zeros(shape, dtype, out_sharding=spec)

    return DecodeState(
        cache=cache,
        history=history,
        token=history.token_at(history.length - 1),
        count=jnp.zeros((), jnp.int32),
        limit=jnp.asarray(limit, jnp.int32),
        done=history.length < 1,
        output=GenerateOutput(
            tokens=zeros(jnp.int32),
            lengths=jnp.zeros_like(history.length),
            logprobs=zeros(jnp.float32),
            top_tokens=zeros(jnp.int32, top_logprobs) if top_logprobs else None,
            top_logprobs=zeros(jnp.float32, top_logprobs) if top_logprobs else None,
        ),
        keys=arguments.row_keys(key, batch),
        sampling=sampling,
        eos_ids=eos_ids,
        constraint=constraint,
    )


def prefill_cache(
    config: LlamaConfig,
    params: Params,
    cache: kv.KVCache,
    tokens: jax.Array,
    start: int | jax.Array,
    stop: int | jax.Array,
    lengths: jax.Array | None = None,
    *,
    chunks: tuple[int, int] = PREFILL_CHUNKS,
) -> kv.KVCache:
    """Runs positions start..stop-1 of tokens int32 [B, S] against the cache, in chunks of two sizes.

    `lengths` int [B] are those of the rows, whose padding has no slots in rings. None: there is no padding,
    or there are no rings.
    """
    batch, length = tokens.shape

    def run_chunk(size: int, first: int | jax.Array, index: jax.Array, cache: kv.KVCache) -> kv.KVCache:
        # Clamped to the end: the last chunk may overlap the one before it, and writes the same values.
        position = jnp.minimum(first + index * size, length - size).astype(jnp.int32)
        ids = jax.lax.dynamic_slice_in_dim(tokens, position, size, axis=1)
        starts = jnp.broadcast_to(position, (batch,))
        return forward_cached(config, params, ids, starts, cache, used=position + size, end=lengths)[1]

    cache = spmd.pvary_like(cache, params, tokens, lengths)
    large, small = (_chunk_size(size, length) for size in chunks)
    maximum: Any = max if isinstance(stop - start, int) else jnp.maximum
    # A remainder of more than half a large chunk takes another large one.
    num_large = maximum((stop - start + large // 2 - 1) // large, 0) if large > small else 0
    rest = start + num_large * large
    num_small = maximum(-((rest - stop) // small), 0)
    for number, size, first in ((num_large, large, start), (num_small, small, rest)):
        if not isinstance(number, int) or number:
            cache = jax.lax.fori_loop(0, number, functools.partial(run_chunk, size, first), cache)
    return cache


def _chunk_size(tokens: int, length: int) -> int:
    """Tokens of a chunk with `tokens` on each device, in rows of `length`."""
    shards = striped_cache.shards()
    size = min(tokens * shards, length)
    return size - size % shards if size > shards else size


def repeat_rows(x: jax.Array, times: int) -> jax.Array:
    """[B, ...] -> [B * times, ...], copies of a row in succession."""
    if times == 1:
        return x
    layout = sharding.spec_of(x)
    repeated = jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:]))
    rows = jnp.reshape(repeated, (x.shape[0] * times, *x.shape[1:]), out_sharding=layout)
    # The batch axes may divide B * times where they do not divide B.
    return rows if layout is None else sharding.constrain(rows, P(sharding.BATCH, *layout[1:]))


def decode_step(
    config: LlamaConfig, params: Params, state: DecodeState, sampler: Sampler = sample
) -> DecodeState:
    """Runs the model on each row's last token and samples the next one.

    Args:
      config: the model.
      params: its parameters, unstacked (`unstack`); otherwise every step copies all of them.
      state: from `prefill` or `decode_step`. The cache must have a free slot: take at most `max_new_tokens`
        steps.
      sampler: maps processed logits, settings and a key per row to a token per row.

    Returns:
      The next state. Rows that are done keep their tokens and length.
    """
    last = state.history.length - 1
    tokens = state.history.token_at(last)[:, None]
    logits, cache = forward_cached(config, params, tokens, last, state.cache)
    logits = sharding.constrain(logits[:, 0], sharding.LOGITS_BV)
    state = sample_token(dataclasses.replace(state, cache=cache), logits, ~state.done, sampler)
    return dataclasses.replace(state, count=state.count + 1)


def sample_token(
    state: DecodeState, logits: jax.Array, live: jax.Array, sampler: Sampler = sample
) -> DecodeState:
    """Samples a token for each live row and appends it; `cache` and `count` are left to the caller.

    Args:
      state: the rows so far.
      logits: f32 [B, V], the model's logits after each row's last token.
      live: bool [B], the rows to sample for; none of them may be done.
      sampler: maps processed logits, settings and a key per row to a token per row.
    """
    history, sampling, old = state.history, state.sampling, state.output
    keys = fold_in_rows(state.keys, old.lengths)
    processed = logits_processors.apply(logits, sampling.processors(), history, state.eos_ids)
    if (constraint := state.constraint) is not None:
        processed = constraints.mask(constraint, processed, logits, state.eos_ids)
    token = jnp.where(live, sampler(processed, sampling, keys), 0)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    one_hot = jnp.arange(logits.shape[-1]) == token[:, None]  # a gather would not keep an explicit sharding
    logprob = jnp.where(one_hot, logits, 0.0).sum(-1) - normalizer
    is_next = (jnp.arange(old.tokens.shape[1]) == old.lengths[:, None]) & live[:, None]

    def write(name: str, value: jax.Array) -> jax.Array:
        mask = is_next.reshape(is_next.shape + (1,) * (value.ndim - 1))
        return jnp.where(mask, value[:, None], getattr(old, name))

    top: dict[str, Any] = {}
    if old.top_tokens is not None:
        values, ids = jax.lax.top_k(logits, old.top_tokens.shape[-1])
        top = {
            "top_tokens": write("top_tokens", ids),
            "top_logprobs": write("top_logprobs", values - normalizer[:, None]),
        }
    if constraint is not None:
        constraint = constraints.advance(constraint, token, live)
    lengths = old.lengths + live
    ends = (token[:, None] == state.eos_ids).any(-1) | (lengths >= state.limit)
    return dataclasses.replace(
        state,
        history=history.append(token, live),
        token=token,
        done=state.done | (live & ends),
        output=GenerateOutput(
            tokens=write("tokens", token), lengths=lengths, logprobs=write("logprobs", logprob), **top
        ),
        constraint=constraint,
    )


def fold_in_rows(keys: jax.Array, data: jax.Array) -> jax.Array:
    """`jax.random.fold_in` row by row: data int [B] into keys [B]."""
    layout = sharding.spec_of(keys)  # vmap requires equal shardings
    return jax.vmap(jax.random.fold_in)(keys, data if layout is None else sharding.constrain(data, layout))


def decode_loop(
    config: LlamaConfig,
    params: Params,
    state: DecodeState,
    steps: int | jax.Array,
    sampler: Sampler = sample,
) -> DecodeState:
    """Takes up to `steps` decoding steps; stops when all rows are done."""
    # Inside shard_map a step's result may vary over more mesh axes than a new state.
    state = spmd.pvary_like(state, params)
    stop = state.count + steps
    return jax.lax.while_loop(
        lambda state: (state.count < stop) & ~jnp.all(state.done),
        lambda state: decode_step(config, params, state, sampler),
        state,
    )
