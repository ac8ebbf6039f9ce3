"""`generate` and `stream`, and the compiled programs that they share.

Called from Python, both run two programs per cache size: one for the prompts, one for any number of decoding
steps. While tracing, everything is inlined in the caller's program.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax import kv_cache as kv
from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding import arguments, processes
from llama_jax.decoding.arguments import EosId
from llama_jax.decoding.constraints import Constraint, GrammarLike
from llama_jax.decoding.finite import warn_if_not_finite
from llama_jax.decoding.keywords import explain_unknown_keywords
from llama_jax.decoding.sampling import Sampling, sample
from llama_jax.decoding.state import (
    DecodeState,
    GenerateOutput,
    Sampler,
    decode_loop,
    init_state,
    prefill,
)
from llama_jax.errors import InputError
from llama_jax.model import Params, compute_dtype, unstack
from llama_jax.ops.compiler_options import decode_options
from llama_jax.taps import Edit, with_edit


@explain_unknown_keywords
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
    edit: Edit | None = None,
    grammar: GrammarLike = None,
) -> GenerateOutput:
    """Generates up to `max_new_tokens` tokens per prompt, in a compiled loop that ends with the last row.

    A pure function: call it inside `jit`, `vmap` (over keys, say) or `shard_map`. It is not differentiable;
    for policy gradients, take those of `forward`'s log-probabilities of the generated tokens.

    Called from Python it compiles two programs per batch size and cache size (prompt plus new tokens,
    rounded up to a power of two, at least 128). No setting, nor `max_new_tokens`, recompiles them;
    `warm_up` compiles them in advance.

    On a mesh any number of rows will do: where `data` x `fsdp` does not divide it, empty rows are added,
    which are done from the start; while tracing, and for a single row, the batch is replicated instead. Over
    several processes each must make the same call, which is checked, and each gets all of the result. If the
    prompts are arrays that span the processes, nothing is checked or fetched: the result is sharded too.

    Args:
      config: the model.
      params: its parameters. Stacked layers are unstacked first, which copies them on every call; pass
        `unstack(params)` to avoid that.
      tokens: int [B, T], right-padded prompts, an array or nested lists; padding may hold any value.
      lengths: int [B], the prompts' lengths, at least 1.
      key: a single key, of which row b uses `fold_in(key, b)`; or one key per row [B].
      sampling: temperature, filters and logits processors, see `Sampling`; None is temperature 1 and
        nothing else.
      max_new_tokens: at least 1. Static while tracing.
      eos_id: the end-of-sequence id or ids. None: every row runs to `max_new_tokens`.
      num_return_sequences: n continuations of each prompt, which is prefilled once; row b * n + i of the
        output is continuation i of prompt b, as if each prompt were given n times. Static.
      top_logprobs: the number of most likely tokens to return per step, with log-probabilities. Static.
      cache_dtype: dtype of the key/value cache: float32, bfloat16, float16, or int8 or float8_e4m3fn
        ("fp8") with one scale per head and position. None is the parameters' dtype. Static.
      edit: replaces values inside the model, of the prompt's tokens and of new ones, see `taps.Edit`.
      grammar: what the continuations may be (`llama_jax.grammar`): one for all rows, or a list with one, or
        None, for each. It needs `eos_id`, and comes after the logits processors and before the filters. A
        row that `max_new_tokens` ends is the beginning of a text. Grammars of one size (states and classes
        of tokens, rounded up to powers of two) run the same program.

    Returns:
      A `GenerateOutput`.

    Raises:
      InputError: for values known at the call (not traced) that cannot work: an empty prompt, an id
        outside the vocabulary, a setting out of range, more positions than the model's context; or a process
        that makes another call, or none.
    """
    params = with_edit(params, edit)
    static = _static_arguments(config, num_return_sequences, top_logprobs, cache_dtype)
    request = arguments.prepare_request(
        config,
        tokens,
        lengths,
        sampling,
        eos_id,
        max_new_tokens,
        params,
        key=key,
        num_return_sequences=num_return_sequences,
        grammar=grammar,
        options=static,
    )
    if request.capacity is None:
        settings = {"constraint": request.constraint, "max_new_tokens": max_new_tokens}
        return _generate(config, params, *request[:4], key, **settings, **static)
    params = unstack_jit(params)
    state = prefill_jit(config, params, request, max_new_tokens, **static)
    state, _ = decode_loop_jit(config, params, state, np.int32(max_new_tokens))
    return processes.truncate(state.output, request.rows * num_return_sequences, max_new_tokens)


@explain_unknown_keywords
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
    edit: Edit | None = None,
    grammar: GrammarLike = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`generate`, one token at a time: the same tokens, from the same programs.

    Returns:
      An iterator of (tokens int32 [B], live bool [B]): the newest token of each row, and whether the row
      was still running; the token of a row that was done is 0.

    Raises:
      InputError: as `generate`, at the call.
    """
    params = with_edit(params, edit)
    static = _static_arguments(config, num_return_sequences, 0, cache_dtype)
    request = arguments.prepare_request(
        config,
        tokens,
        lengths,
        sampling,
        eos_id,
        max_new_tokens,
        key=key,
        num_return_sequences=num_return_sequences,
        grammar=grammar,
        function="stream",
        options=static,
    )
    params = unstack_jit(params)
    state = prefill_jit(config, params, request, max_new_tokens, **static)
    rows = request.rows * num_return_sequences
    live = np.ones(rows, bool) if request.capacity is not None else ~processes.fetch(state.done)
    return _iterate(config, params, state, live)


def _iterate(
    config: LlamaConfig, params: Params, state: DecodeState, live: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rows, checked = len(live), False
    while live.any():
        state, newest = decode_loop_jit(config, params, state, np.int32(1))
        if not checked:
            warn_if_not_finite(params, newest.logprob)
            checked = True
        yield np.asarray(newest.token)[:rows], live
        live = ~np.asarray(newest.done)[:rows]


def warm_up(
    config: LlamaConfig,
    params: Params,
    *,
    batch: int = 1,
    max_length: int | None = None,
    num_return_sequences: int = 1,
    top_logprobs: int = 0,
    cache_dtype: jax.typing.DTypeLike | None = None,
    grammar: GrammarLike = None,
) -> int:
    """Compiles every program that `generate` and `stream` need, so that no later call compiles.

    Args:
      config: the model.
      params: its parameters.
      batch: batch size of the later calls.
      max_length: maximum of prompt plus new tokens; None is the model's context.
      num_return_sequences: as in the later calls; likewise the next two.
      top_logprobs: see `generate`.
      cache_dtype: see `generate`.
      grammar: grammars of the sizes of later ones, which have programs of their own.

    Returns:
      The number of cache sizes; each has two programs.

    Raises:
      InputError: for a batch or length that is not a positive integer, or a length beyond the context.
    """
    context = config.max_position_embeddings
    longest = context if max_length is None else arguments.check_int("max_length", max_length, minimum=2)
    if longest > context:
        raise InputError(f"max_length is {longest}; the model's context has {context} positions")
    batch = arguments.check_int("batch", batch)
    static = _static_arguments(config, num_return_sequences, top_logprobs, cache_dtype)
    prompts = np.zeros((batch, 1), np.int32), np.ones(batch, np.int32)
    params = unstack_jit(params)
    sizes = 0
    capacity = arguments.cache_capacity(2)
    while True:
        new_tokens = min(capacity, longest) - 1
        request = arguments.prepare_request(
            config,
            *prompts,
            Sampling(),
            None if grammar is None else 0,
            new_tokens,
            key=jax.random.key(0),
            num_return_sequences=num_return_sequences,
            grammar=grammar,
            function="warm_up",
            options=static,
        )
        state = prefill_jit(config, params, request, new_tokens, **static)
        state, _ = decode_loop_jit(config, params, state, np.int32(1))
        processes.fetch(state.output)
        sizes += 1
        if capacity >= longest:
            return sizes
        capacity *= 2


def prefill_jit(
    config: LlamaConfig,
    params: Params,
    request: arguments.Request,
    max_new_tokens: int,
    **static: Any,
) -> DecodeState:
    """The state after the request's prompts, from a compiled program."""
    prompts, key = (request.tokens, request.lengths), request.key
    if request.capacity is None or request.max_prompt_length is None:
        settings = {"max_new_tokens": max_new_tokens, "eos_id": request.eos_ids}
        settings |= {"constraint": request.constraint, **static}
        return _prefill_exact(config, params, *prompts, key, request.sampling, **settings)
    return _prefill_bucketed(
        config,
        params,
        *prompts,
        np.int32(request.max_prompt_length - 1),
        key,
        request.sampling,
        request.eos_ids,
        np.int32(max_new_tokens),
        request.constraint,
        **static,
    )


_STATIC = ("config", "num_return_sequences", "top_logprobs", "cache_dtype")
_prefill_exact = jax.jit(prefill, static_argnames=(*_STATIC, "max_new_tokens"))
_unstack = jax.jit(unstack)


class Newest(NamedTuple):
    """What the host reads of a state after each step; replicated, so that every process can.

    Attributes:
      token: int32 [B], the newest token.
      done: bool [B].
      logprob: f32 [B], the token's log-probability; 0 in rows that had ended before it.
    """

    token: jax.Array
    done: jax.Array
    logprob: jax.Array


def decode_loop_jit(
    config: LlamaConfig, params: Params, state: DecodeState, steps: np.int32, sampler: Sampler = sample
) -> tuple[DecodeState, Newest]:
    """`decode_loop`, compiled; the state is donated."""
    device = next(iter(jax.tree.leaves(state)[0].devices()))
    return decode_program(device.platform)(config, params, state, steps, sampler=sampler)


@functools.cache
def decode_program(platform: str) -> Any:
    """The jitted function of `decode_loop_jit` on a platform."""
    options = decode_options(platform)
    return jax.jit(
        _decode,
        static_argnames=("config", "sampler"),
        donate_argnames=("state",),
        compiler_options=options,
    )


def _decode(
    config: LlamaConfig, params: Params, state: DecodeState, steps: jax.Array, sampler: Sampler = sample
) -> tuple[DecodeState, Newest]:
    state = decode_loop(config, params, state, steps, sampler)
    output = state.output
    is_newest = jnp.arange(output.logprobs.shape[1]) == output.lengths[:, None] - 1
    newest = Newest(state.token, state.done, jnp.where(is_newest, output.logprobs, 0.0).sum(-1))
    return state, jax.tree.map(lambda x: sharding.constrain(x, P(None)), newest)


@functools.partial(jax.jit, static_argnames=_STATIC)
def _prefill_bucketed(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    stop: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    eos_ids: jax.Array,
    limit: jax.Array,
    constraint: Constraint | None = None,
    *,
    num_return_sequences: int,
    top_logprobs: int,
    cache_dtype: str | None,
) -> DecodeState:
    """`init_state` with a new cache of the width of `tokens`, which includes the columns for new tokens."""
    batch, capacity = tokens.shape
    cache = kv.init_cache(config, batch, capacity, cache_dtype or compute_dtype(params))
    return init_state(
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
        constraint,
        new_tokens=capacity,
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
    return decode_loop(config, params, state, static["max_new_tokens"]).output


def unstack_jit(params: Params) -> Params:
    """`unstack` as one compiled program, instead of one per layer; unstacked parameters pass through."""
    return _unstack(params) if isinstance(params["layers"], Mapping) else params


def _static_arguments(
    config: LlamaConfig, num_return_sequences: int, top_logprobs: int, cache_dtype: Any
) -> dict[str, Any]:
    top_logprobs = arguments.check_int("top_logprobs", top_logprobs, minimum=0)
    if top_logprobs > config.vocab_size:
        raise InputError(f"top_logprobs is {top_logprobs}; the vocabulary has {config.vocab_size} tokens")
    return {
        "num_return_sequences": arguments.check_int("num_return_sequences", num_return_sequences),
        "top_logprobs": top_logprobs,
        "cache_dtype": kv.dtype_name(cache_dtype),
    }
