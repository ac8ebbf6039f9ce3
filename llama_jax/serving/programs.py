"""The device's side of a `Batcher`: compiled programs over B rows of one preallocated cache.

A prompt is run chunk by chunk in a cache of its own, of one row (`prefill_chunk`), which then is copied into
a free row of the batch (`join`); what a prompt has in common with a row is copied the other way
(`copy_prefix`). `decode` takes steps of the first R rows at once, for a few values of R, as the rows that are
live can be moved there (`move`). Rows, positions, lengths and settings are arguments: none recompiles.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import kv_cache as kv
from llama_jax.config import LlamaConfig
from llama_jax.decoding import constraints
from llama_jax.decoding.logits_processors import TokenHistory
from llama_jax.decoding.sampling import Sampling
from llama_jax.decoding.state import DecodeState, GenerateOutput, sample_token
from llama_jax.model import Params, forward_cached
from llama_jax.ops.compiler_options import decode_options

COPY_BLOCK = 256
"""Slots that are copied at once."""

_OFF = Sampling(temperature=0.0, suppress_tokens=-1, forced_tokens=-1)


class Steps(NamedTuple):
    """What the host reads after some decoding steps, at most K, of the first R rows.

    Attributes:
      tokens: int32 [K, R]; step by step, those of rows that were live.
      live: bool [K, R], false in steps that were not taken.
      logprobs: f32 [K, R], as `GenerateOutput.logprobs`.
      top_tokens: int32 [K, R, n], the most likely tokens in descending order, if they were asked for.
      top_logprobs: f32 [K, R, n].
    """

    tokens: jax.Array
    live: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "rows", "length", "dtype", "num_ids", "num_eos"))
def init_rows(
    config: LlamaConfig, rows: int, length: int, dtype: str, num_ids: int, num_eos: int
) -> DecodeState:
    """Rows without a request: done, and of length 0.

    A `DecodeState` with a limit and end-of-sequence ids for each row, [B] and [B, E], and an output of no
    columns: tokens go to the host after every step.

    Args:
      config: the model.
      rows: B.
      length: S, the cache's slots.
      dtype: of the cache.
      num_ids: the most ids in a row's `suppress_tokens` and `forced_tokens`.
      num_eos: E.
    """
    ids = jnp.full((rows, num_ids), -1, jnp.int32)
    zeros = jnp.zeros(rows, jnp.int32)
    sampling = Sampling(temperature=0.0, suppress_tokens=ids, forced_tokens=ids).broadcast(rows)
    return DecodeState(
        cache=kv.init_cache(config, rows, length, dtype),
        history=TokenHistory(jnp.zeros((rows, length), jnp.int32), zeros, zeros),
        token=zeros,
        count=jnp.zeros((), jnp.int32),
        limit=zeros,
        done=jnp.ones(rows, bool),
        output=GenerateOutput(
            tokens=jnp.zeros((rows, 0), jnp.int32), lengths=zeros, logprobs=jnp.zeros((rows, 0), jnp.float32)
        ),
        keys=jax.random.split(jax.random.key(0), rows),
        sampling=jax.tree.map(jnp.asarray, sampling),
        eos_ids=jnp.full((rows, num_eos), -1, jnp.int32),
    )


@functools.partial(jax.jit, static_argnames=("config", "length", "dtype"))
def init_prompt_cache(config: LlamaConfig, length: int, dtype: str) -> kv.KVCache:
    """The cache of one row in which prompts are run."""
    return kv.init_cache(config, 1, length, dtype)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill_chunk(
    config: LlamaConfig, params: Params, cache: kv.KVCache, ids: jax.Array, start: jax.Array, end: jax.Array
) -> kv.KVCache:
    """Runs ids int32 [1, T] from position `start` [] on, of a prompt with `end` [] tokens; then padding."""
    used = start + ids.shape[1]
    return forward_cached(config, params, ids, start[None], cache, used=used, end=end[None])[1]


@functools.partial(jax.jit, donate_argnames="cache")
def copy_prefix(cache: kv.KVCache, rows: kv.KVCache, row: jax.Array, used: jax.Array) -> kv.KVCache:
    """Copies the first `used` [] positions of a row into the cache of one row."""
    return _copy_slots(cache, rows, jnp.int32(0), row, used)


@functools.partial(jax.jit, donate_argnames="state")
def join(
    state: DecodeState,
    cache: kv.KVCache,
    row: jax.Array,
    tokens: jax.Array,
    length: jax.Array,
    limit: jax.Array,
    eos_ids: jax.Array,
    key_data: jax.Array,
    index: jax.Array,
    sampling: Sampling,
    grammar: jax.Array,
) -> DecodeState:
    """Starts a request in a row, whose prompt but for the last token is in `cache`.

    Args:
      state: the rows.
      cache: of one row.
      row: int [].
      tokens: int32 [S], the prompt, padded.
      length: int [], its tokens.
      limit: int [], the most tokens to generate.
      eos_ids: int32 [E].
      key_data: of one key.
      index: int [], which is folded into the key: row `index` of a batch with that key samples the same.
      sampling: settings of one row, with the ids' widths of `init_rows`.
      grammar: int [], its grammar among those of the state's constraint; -1 for none.
    """

    def put(rows: jax.Array, value: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(rows, value, row, axis=0)

    history, old = state.history, state.output
    key = jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(state.keys))
    return dataclasses.replace(
        state,
        cache=_copy_slots(state.cache, cache, row, jnp.int32(0), length - 1),
        history=TokenHistory(
            put(history.tokens, tokens), put(history.length, length), put(history.prompt_length, length)
        ),
        limit=put(state.limit, limit),
        done=put(state.done, jnp.asarray(False)),
        output=dataclasses.replace(old, lengths=put(old.lengths, jnp.int32(0))),
        keys=put(state.keys, jax.random.fold_in(key, index)),
        sampling=jax.tree.map(lambda rows, value: put(rows, value[0]), state.sampling, sampling),
        eos_ids=put(state.eos_ids, eos_ids),
        constraint=None if state.constraint is None else constraints.begin(state.constraint, row, grammar),
    )


@functools.cache
def decode_program(platform: str) -> Any:
    """The jitted `decode` on a platform; the state is donated."""
    return jax.jit(
        decode,
        static_argnames=("config", "rows", "most_steps", "num_top"),
        donate_argnames="state",
        compiler_options=decode_options(platform),
    )


def decode(
    config: LlamaConfig,
    params: Params,
    state: DecodeState,
    stopped: jax.Array,
    steps: jax.Array,
    with_top: jax.Array,
    *,
    rows: int,
    most_steps: int,
    num_top: int,
) -> tuple[DecodeState, Steps]:
    """Takes decoding steps of the first rows; those that are done hold still.

    Args:
      config: the model.
      params: its parameters, unstacked.
      state: the rows.
      stopped: bool [R], rows that end here.
      steps: int [], at most `most_steps`; fewer are taken if all of these rows are done.
      with_top: bool [], whether the most likely tokens are wanted.
      rows: R. All later ones are done.
      most_steps: K.
      num_top: n.
    """
    whole = state
    first = jax.tree.map(lambda x: x[:rows] if x.ndim else x, _by_row(state))

    def most_likely(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, tokens = jax.lax.top_k(logits, num_top)
        return values, tokens

    def none(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((rows, num_top), jnp.float32), jnp.zeros((rows, num_top), jnp.int32)

    def step(carry: tuple[jax.Array, DecodeState, Steps]) -> tuple[jax.Array, DecodeState, Steps]:
        taken, state, found = carry
        live, history = ~state.done, state.history
        last = history.length - 1
        # The slots that live rows read. What others read only has to be numbers: they write to the slot of
        # their last token, which is not read again.
        used = jnp.max(jnp.where(live, history.length, 1))
        ids = history.token_at(last)[:, None]
        logits, cache = forward_cached(config, params, ids, jnp.maximum(last, 0), state.cache, used=used)
        logits = logits[:, 0]
        # Settings of rows that are done would turn on for all rows what those that are live do without.
        sampling = jax.tree.map(
            lambda x, off: jnp.where(live.reshape(-1, *(1,) * (x.ndim - 1)), x, off), state.sampling, _OFF
        )
        running = dataclasses.replace(state, cache=cache, sampling=sampling)
        state = dataclasses.replace(sample_token(running, logits, live), sampling=state.sampling)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.arange(logits.shape[-1]) == state.token[:, None]
        top_logits, top_tokens = jax.lax.cond(with_top, most_likely, none, logits)
        new = Steps(
            tokens=state.token,
            live=live,
            logprobs=jnp.where(chosen, logits, 0.0).sum(-1) - normalizer,
            top_tokens=top_tokens,
            top_logprobs=top_logits - normalizer[:, None],
        )
        found = jax.tree.map(lambda all, x: all.at[taken].set(x), found, new)
        return taken + 1, dataclasses.replace(state, count=state.count + 1), found

    empty = Steps(
        tokens=jnp.zeros((most_steps, rows), jnp.int32),
        live=jnp.zeros((most_steps, rows), bool),
        logprobs=jnp.zeros((most_steps, rows), jnp.float32),
        top_tokens=jnp.zeros((most_steps, rows, num_top), jnp.int32),
        top_logprobs=jnp.zeros((most_steps, rows, num_top), jnp.float32),
    )
    first = dataclasses.replace(_with_shared(first, whole), done=first.done | stopped)
    _, first, found = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & ~jnp.all(carry[1].done), step, (jnp.int32(0), first, empty)
    )
    state = jax.tree.map(lambda all, x: all.at[:rows].set(x) if x.ndim else x, _by_row(whole), _by_row(first))
    return _with_shared(state, first), found


@functools.partial(jax.jit, donate_argnames="state")
def move(state: DecodeState, row: jax.Array, to: jax.Array) -> DecodeState:
    """Moves a row to another place, so that the rows that are live stand first; the old one is done."""

    def copy(rows: jax.Array) -> jax.Array:
        if not rows.ndim:
            return rows
        return jax.lax.dynamic_update_index_in_dim(
            rows, jax.lax.dynamic_index_in_dim(rows, row, keepdims=False), to, axis=0
        )

    length = jax.lax.dynamic_index_in_dim(state.history.length, row, keepdims=False)
    cache = _copy_slots(state.cache, state.cache, to, row, length)
    moved = _with_shared(jax.tree.map(copy, _by_row(state)), state)
    return dataclasses.replace(moved, cache=cache, done=moved.done.at[row].set(True))


def _by_row(state: DecodeState) -> DecodeState:
    """What a state has of each row: not the cache, which is written in place, nor the grammars' arrays."""
    constraint = state.constraint
    if constraint is not None:
        no_grammars: Any = ()
        constraint = dataclasses.replace(constraint, grammars=no_grammars)
    return dataclasses.replace(state, cache=kv.KVCache(k=(), v=()), constraint=constraint)


def _with_shared(state: DecodeState, whole: DecodeState) -> DecodeState:
    """The inverse of `_by_row`: `state` with the cache and the grammars of `whole`."""
    constraint = state.constraint
    if constraint is not None:
        assert whole.constraint is not None
        constraint = dataclasses.replace(constraint, grammars=whole.constraint.grammars)
    return dataclasses.replace(state, cache=whole.cache, constraint=constraint)


def _copy_slots(
    target: kv.KVCache, source: kv.KVCache, to: jax.Array, of: jax.Array, used: jax.Array
) -> kv.KVCache:
    """Copies the slots of positions 0..used-1, of row `of` into row `to`, in place; of rings, all slots."""
    same = target is source

    def copy_block(index: jax.Array, target: kv.KVCache) -> kv.KVCache:
        def copy(target: jax.Array, source: jax.Array) -> jax.Array:
            slots, rest = target.shape[2], target.shape[3:]
            size = min(COPY_BLOCK, slots)
            start = jnp.minimum(index * size, slots - size)  # the last block may overlap the one before it
            at = (jnp.int32(0), start, *(jnp.int32(0) for _ in rest))
            block = jax.lax.dynamic_slice(source, (of, *at), (1, source.shape[1], size, *rest))
            return jax.lax.dynamic_update_slice(target, block, (to, *at))

        return jax.tree.map(copy, target, target if same else source)

    return jax.lax.fori_loop(0, -(-used // COPY_BLOCK), copy_block, target)


def one_row(sampling: Sampling, num_ids: int) -> Sampling:
    """Settings of one row as numpy arrays [1], ids [1, I] with I of `num_ids`; no operation of JAX."""

    def ids(value: Any) -> np.ndarray:
        padded = np.full((1, num_ids), -1, np.int32)
        given = np.asarray(value, np.int32).reshape(-1)
        padded[0, : given.size] = given
        return padded

    def scalar(value: Any, dtype: Any) -> np.ndarray:
        return np.asarray(value, dtype).reshape(1)

    return Sampling(
        temperature=scalar(sampling.temperature, np.float32),
        top_k=scalar(sampling.top_k, np.int32),
        top_p=scalar(sampling.top_p, np.float32),
        min_p=scalar(sampling.min_p, np.float32),
        repetition_penalty=scalar(sampling.repetition_penalty, np.float32),
        presence_penalty=scalar(sampling.presence_penalty, np.float32),
        frequency_penalty=scalar(sampling.frequency_penalty, np.float32),
        no_repeat_ngram_size=scalar(sampling.no_repeat_ngram_size, np.int32),
        min_new_tokens=scalar(sampling.min_new_tokens, np.int32),
        suppress_tokens=ids(sampling.suppress_tokens),
        forced_tokens=ids(sampling.forced_tokens),
    )
