"""Whole generations: `generate` on the device, `stream` on the host, and the few programs behind both.

Called from Python, the two share two compiled programs a size of cache: one reads the prompts, one takes
as many steps as it is told. While tracing, everything is inlined in the caller's program.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from llama_jax import kv_cache as kv
from llama_jax.config import LlamaConfig
from llama_jax.decoding import arguments
from llama_jax.decoding.arguments import EosId
from llama_jax.decoding.sampling import Sampling
from llama_jax.decoding.state import DecodeState, GenerateOutput, advance, begin, prefill
from llama_jax.errors import InputError
from llama_jax.model import Params, compute_dtype, unstack


def generate(
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
) -> GenerateOutput:
    """Continues each prompt by up to `max_new_tokens`, in a compiled loop that stops when all rows end.

    A pure function: call it inside `jit`, `vmap` (over keys, say) or `shard_map` as you would any other.
    No gradient goes through it: take those of `forward`'s log-probabilities of the tokens it chose.
    Called from Python it compiles two programs for each batch size and each power of two, from 128, that
    prompt and new tokens need together; no value of any setting, nor `max_new_tokens`, recompiles them.
    `warm_up` compiles them beforehand.

    Args:
      config: the model.
      params: its parameters. Stacked layers are unstacked first, which copies them once a call; pass
        `unstack(params)` to save that.
      tokens: int [B, T], prompts padded on the right with anything.
      lengths: int [B], how many of each row's tokens are its prompt, at least 1.
      key: one key, from which row b draws with `fold_in(key, b)`; or one key a row.
      sampling: temperature, filters and rules, see `Sampling`; its defaults (plain random sampling) if None.
      max_new_tokens: at least 1; static while tracing.
      eos_id: the id, or ids, that end a row. None: every row runs to `max_new_tokens`.
      num_return_sequences: continuations of each prompt, which is read once; row b * n + i of the result
        is number i of prompt b, as if each prompt were there n times. Static.
      top_logprobs: how many of each step's likeliest tokens to return with their log-probabilities. Static.
      cache_dtype: what to hold keys and values in: float32, bfloat16, float16, or int8 with a scale for
        each head's vector. The parameters' own if None. Static.

    Returns:
      A `GenerateOutput`.

    Raises:
      InputError: for values known at the call (not traced) that cannot work: an empty prompt, an id
        outside the vocabulary, a setting out of range, more positions than the model's context.
    """
    static = _static(config, num_return_sequences, top_logprobs, cache_dtype)
    request = arguments.check(config, tokens, lengths, sampling, eos_id, max_new_tokens, params, key)
    if request.capacity is None:
        return _generate(config, params, *request[:4], key, max_new_tokens=max_new_tokens, **static)
    params = unstacked(params)
    state = start(config, params, request, key, max_new_tokens, **static)
    state = advance_jit(config, params, state, np.int32(max_new_tokens))
    return shortened(state.output, max_new_tokens)


def stream(
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
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`generate`, a token at a time on the host: the same tokens, from the same programs.

    Returns:
      An iterator of (tokens int32 [B], live bool [B]): the newest token of each row, and whether the row
      had not ended before it; the token of a row that had is 0.

    Raises:
      InputError: as `generate` does, at the call.
    """
    static = _static(config, num_return_sequences, 0, cache_dtype)
    request = arguments.check(config, tokens, lengths, sampling, eos_id, max_new_tokens)
    params = unstacked(params)
    return tokens_of(config, params, start(config, params, request, key, max_new_tokens, **static))


def tokens_of(
    config: LlamaConfig, params: Params, state: DecodeState
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Steps a state to its end on the host; see `stream`, which this is the second half of."""
    live = ~np.asarray(state.done)
    while live.any():
        state = advance_jit(config, params, state, np.int32(1))
        yield np.asarray(state.token), live
        live = ~np.asarray(state.done)


def warm_up(
    config: LlamaConfig,
    params: Params,
    *,
    batch: int = 1,
    max_length: int | None = None,
    num_return_sequences: int = 1,
    top_logprobs: int = 0,
    cache_dtype: jax.typing.DTypeLike | None = None,
) -> int:
    """Compiles all that `generate` and `stream` need, so that no later call waits for a compiler.

    Args:
      config: the model.
      params: its parameters.
      batch: rows that the calls will have.
      max_length: prompt and new tokens together, at most; the model's context if None.
      num_return_sequences: as the calls will give it, like the two after it.
      top_logprobs: likewise.
      cache_dtype: likewise.

    Returns:
      How many sizes of cache it prepared; each has two programs.

    Raises:
      InputError: for a batch, or a length, that is no whole number of at least 1, or past the context.
    """
    context = config.max_position_embeddings
    longest = context if max_length is None else arguments.whole_number("max_length", max_length, least=2)
    if longest > context:
        raise InputError(f"max_length is {longest}; the model's context has {context} positions")
    batch = arguments.whole_number("batch", batch)
    static = _static(config, num_return_sequences, top_logprobs, cache_dtype)
    prompts = np.zeros((batch, 1), np.int32), np.ones(batch, np.int32)
    params = unstacked(params)
    sizes = 0
    room = arguments.capacity(2)
    while True:
        new = min(room, longest) - 1
        request = arguments.check(config, *prompts, Sampling(), None, new)
        state = start(config, params, request, jax.random.key(0), new, **static)
        jax.block_until_ready(advance_jit(config, params, state, np.int32(1)))
        sizes += 1
        if room >= longest:
            return sizes
        room *= 2


def start(
    config: LlamaConfig,
    params: Params,
    request: arguments.Request,
    key: jax.Array,
    max_new_tokens: int,
    **static: Any,
) -> DecodeState:
    """The state after reading a request's prompts, from a compiled program."""
    prompts = request.tokens, request.lengths
    if request.capacity is None or request.longest is None:
        settings = {"max_new_tokens": max_new_tokens, "eos_id": request.eos_ids}
        return _prefill(config, params, *prompts, key, request.sampling, **settings, **static)
    return _start(
        config,
        params,
        *prompts,
        np.int32(request.longest - 1),
        key,
        request.sampling,
        request.eos_ids,
        np.int32(max_new_tokens),
        **static,
    )


_STATIC = ("config", "num_return_sequences", "top_logprobs", "cache_dtype")
_prefill = jax.jit(prefill, static_argnames=(*_STATIC, "max_new_tokens"))
_unstack = jax.jit(unstack)


def advance_jit(config: LlamaConfig, params: Params, state: DecodeState, steps: np.int32) -> DecodeState:
    """`advance`, compiled; the state is used up."""
    return advancing(jax.default_backend())(config, params, state, steps)


@functools.cache
def advancing(backend: str) -> Any:
    """The program behind `advance_jit`, for a backend."""
    # By itself XLA:CPU keeps to 256 bits where a processor has 512; weights then come out of memory slower.
    options = {"xla_cpu_prefer_vector_width": 512} if backend == "cpu" else None
    return jax.jit(advance, static_argnames=("config",), donate_argnames=("state",), compiler_options=options)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _start(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    stop: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    limit: jax.Array,
    *,
    num_return_sequences: int,
    top_logprobs: int,
    cache_dtype: str | None,
) -> DecodeState:
    """`begin` with a fresh cache as long as `tokens`, which leave room for what is to come."""
    batch, room = tokens.shape
    cache = kv.init_cache(config, batch, room, cache_dtype or compute_dtype(params))
    return begin(
        config,
        params,
        cache,
        tokens,
        lengths,
        0,
        stop,
        key,
        sampling,
        eos_ids,
        limit,
        new_tokens=room,
        num_return_sequences=num_return_sequences,
        top_logprobs=top_logprobs,
    )


@functools.partial(jax.jit, static_argnames=(*_STATIC, "max_new_tokens"))
def _generate(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    key: jax.Array,
    **static: Any,
) -> GenerateOutput:
    params = jax.lax.stop_gradient(unstack(params))
    state = prefill(config, params, tokens, lengths, key, sampling, eos_id=eos_ids, **static)
    return advance(config, params, state, static["max_new_tokens"]).output


def unstacked(params: Params) -> Params:
    """`unstack` for callers outside `jit`: one program rather than one a layer."""
    return _unstack(params) if isinstance(params["layers"], Mapping) else params


def _static(
    config: LlamaConfig, num_return_sequences: int, top_logprobs: int, cache_dtype: Any
) -> dict[str, Any]:
    """The arguments that a program is compiled for, checked."""
    top = arguments.whole_number("top_logprobs", top_logprobs, least=0)
    if top > config.vocab_size:
        raise InputError(f"top_logprobs is {top}; the vocabulary has {config.vocab_size} tokens")
    return {
        "num_return_sequences": arguments.whole_number("num_return_sequences", num_return_sequences),
        "top_logprobs": top,
        "cache_dtype": kv.dtype_name(cache_dtype),
    }


def shortened(generation: GenerateOutput, length: int) -> GenerateOutput:
    """The first `length` columns, cut on the host: a slice on the device is a program for each length."""

    def cut(x: jax.Array) -> jax.Array:
        return x if x.ndim == 1 else jax.device_put(np.asarray(x)[:, :length], x.sharding)

    return jax.tree.map(cut, generation)
