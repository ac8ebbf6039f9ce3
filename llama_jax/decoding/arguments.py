"""Checks and padding of the arguments of `generate`, `beam_search` and `speculative_generate`.

Values known at the call are handled in numpy and moved by `device_put`: any JAX operation, `jnp.asarray`
included, would compile a program for each shape.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding import constraints, processes
from llama_jax.decoding.constraints import Constraint, GrammarLike
from llama_jax.decoding.sampling import Sampling
from llama_jax.errors import InputError
from llama_jax.ops.inputs import as_array

EosId = int | Sequence[int] | jax.Array | None


class Request(NamedTuple):
    """Arguments of a generation, checked as far as their values are known.

    Attributes:
      tokens: int32 [B, T], right-padded; T is `capacity` where that is known.
      lengths: int32 [B].
      sampling: settings, one value per row.
      eos_ids: int32 [E], padded with -1.
      max_prompt_length: the maximum of `lengths`; None while tracing, or where other processes hold a part
        of them.
      capacity: cache slots for prompt and continuation, a power of two; None likewise.
      key: as it was given, with a key for each row that was added.
      rows: the number of rows that were given. Where the batch axes of the mesh do not divide it, empty rows
        (of length 0, done from the start) are added to the arrays above, if their values are known.
      constraint: every row at the start of its grammar; None without any.
    """

    tokens: jax.Array
    lengths: jax.Array
    sampling: Sampling
    eos_ids: jax.Array
    max_prompt_length: int | None
    capacity: int | None
    key: Any
    rows: int
    constraint: Constraint | None


def prepare_request(
    config: LlamaConfig,
    tokens: Any,
    lengths: Any,
    sampling: Sampling | None,
    eos_id: EosId,
    max_new_tokens: int,
    *others: Any,
    key: Any = None,
    num_return_sequences: int = 1,
    grammar: GrammarLike = None,
    function: str = "generate",
    options: Any = None,
) -> Request:
    """Checks the arguments of a generation and pads them to the shapes that programs are compiled for.

    Over several processes it also checks that all make the same call.

    Args:
      config: the model.
      tokens: int [B, T].
      lengths: int [B].
      sampling: settings, or None for the defaults.
      eos_id: end-of-sequence ids.
      max_new_tokens: at least 1.
      *others: further arguments; if any leaf of them is a tracer, the request counts as traced.
      key: a key, or B * num_return_sequences of them.
      num_return_sequences: continuations of each row.
      grammar: one for all rows, or one for each.
      function: what was called, for the comparison of processes.
      options: its other arguments, likewise.

    Raises:
      InputError: for known values that cannot work; for a call that differs between processes.
    """
    try:
        request = _prepare(
            config,
            tokens,
            lengths,
            sampling,
            eos_id,
            max_new_tokens,
            (*others, key, grammar),
            key,
            num_return_sequences,
            grammar,
        )
    except InputError as error:
        processes.tell_failure(error)
        raise
    if request.capacity is not None:
        processes.check_same_call(
            {
                "function": function,
                "prompts": (request.tokens, request.lengths),
                "key": key,
                "sampling": request.sampling,
                "options": (request.eos_ids, max_new_tokens, options, request.constraint),
            }
        )
    return request


def _prepare(
    config: LlamaConfig,
    tokens: Any,
    lengths: Any,
    sampling: Sampling | None,
    eos_id: EosId,
    max_new_tokens: int,
    others: tuple[Any, ...],
    key: Any,
    num_return_sequences: int,
    grammar: GrammarLike,
) -> Request:
    sampling = Sampling() if sampling is None else sampling
    tokens, lengths = as_array("tokens", tokens), as_array("lengths", lengths)
    if jnp.ndim(tokens) != 2:
        raise InputError(f"tokens has shape {jnp.shape(tokens)}; it must be [batch, length]")
    batch, length = jnp.shape(tokens)
    if batch < 1 or length < 1:
        raise InputError(
            f"tokens has shape {(batch, length)}; a prompt needs at least one token (a BOS, say)"
        )
    if jnp.shape(lengths) != (batch,):
        raise InputError(f"lengths has shape {jnp.shape(lengths)}; it must be [{batch}], one per row")
    for name, array in (("tokens", tokens), ("lengths", lengths)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise InputError(f"{name} is {jnp.result_type(array)}; it must be whole numbers")
    check_int("max_new_tokens", max_new_tokens)
    sampling.check(batch, config.vocab_size)
    ids, counts = concrete(tokens), concrete(lengths)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((sampling, eos_id, others)))
    max_prompt_length = None
    if counts is not None:
        _check_lengths(config, counts, length, int(max_new_tokens))
        if ids is not None:
            _check_ids(config, ids, counts)
            max_prompt_length = None if traced else int(counts.max())
    capacity = None if max_prompt_length is None else cache_capacity(max_prompt_length + max_new_tokens)
    sampling, rows = sampling.broadcast(batch), batch
    if ids is not None:
        # Padding may hold any integer, also one that int32 cannot represent.
        ids = np.clip(ids, -1, 2**31 - 1).astype(np.int32)
        if capacity is not None and max_prompt_length is not None and counts is not None:
            rows = sharding.filled_rows(batch, num_return_sequences)
            added = ((0, rows - batch), (0, capacity - max_prompt_length))
            ids = np.pad(ids[:, :max_prompt_length], added)
            if rows != batch:
                counts = np.pad(counts, added[0])
                sampling = jax.tree.map(lambda x: _repeat_last(x, rows), sampling)
                key = _fill_keys(key, batch * num_return_sequences, rows * num_return_sequences)
        tokens = jax.device_put(ids)
    counts = lengths if counts is None else jax.device_put(counts.astype(np.int32))
    return Request(
        tokens=jnp.asarray(tokens, jnp.int32),
        lengths=jnp.asarray(counts, jnp.int32),
        sampling=sampling,
        eos_ids=pad_eos_ids(eos_id),
        max_prompt_length=max_prompt_length,
        capacity=capacity,
        key=key,
        rows=batch,
        constraint=constraints.prepare(grammar, config.vocab_size, batch, rows, eos_id),
    )


def _repeat_last(x: jax.typing.ArrayLike, rows: int) -> jax.Array:
    """[B, ...] -> [rows, ...], on the host: a value that no other row has could turn a filter on."""
    values = np.asarray(x)
    return jax.device_put(
        np.pad(values, [(0, rows - len(values))] + [(0, 0)] * (values.ndim - 1), mode="edge")
    )


def _fill_keys(key: Any, batch: int, rows: int) -> Any:
    """`rows` keys of `batch` ones; anything else unchanged, for `row_keys` to check."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == (batch,):
        data = _repeat_last(jax.random.key_data(key), rows)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return _repeat_last(key, rows) if dtype == jnp.uint32 and key.shape == (batch, 2) else key


def cache_capacity(length: int) -> int:
    """The number of cache slots for sequences of up to `length` tokens: a power of two, at least 128."""
    return max(128, 1 << (length - 1).bit_length())


def check_int(name: str, value: Any, minimum: int = 1) -> int:
    """Returns `value` as an int.

    Raises:
      InputError: if it is not an integer of at least `minimum`.
    """
    is_int = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not is_int or value < minimum:
        raise InputError(f"{name} is {value!r}; it must be a whole number, at least {minimum}")
    return int(value)


def pad_eos_ids(eos_id: EosId) -> jax.Array:
    """End-of-sequence ids int32 [E], padded with -1 to a multiple of 8: their count recompiles nothing.

    Raises:
      InputError: for anything but an integer or a sequence of them.
    """
    if isinstance(eos_id, jax.core.Tracer):
        ids = jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32))
        return jnp.pad(ids, (0, -ids.size % 8), constant_values=-1)
    values = np.atleast_1d(np.asarray([] if eos_id is None else eos_id))
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise InputError(f"eos_id is {eos_id!r}; it must be a token id, a sequence of them, or None")
    padded = np.full(max(8, -(-values.size // 8) * 8), -1, np.int32)
    padded[: values.size] = values
    return jax.device_put(padded)


def row_keys(key: jax.Array, batch: int) -> jax.Array:
    """One typed key per row, from a single key or B of them; legacy uint32 keys are accepted.

    Raises:
      InputError: for another number of keys, or an array that is not a key.
    """
    if not hasattr(key, "dtype"):
        raise InputError(f"key is {str(key)[:40]}; make one with jax.random.key(seed)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim not in (1, 2):
            raise InputError(f"key is {key.dtype} of shape {key.shape}; make one with jax.random.key(seed)")
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise InputError(f"key has shape {key.shape}; give one key, or one for each of {batch} rows")
    return key


def concrete(array: Any) -> np.ndarray | None:
    """The values as numpy; None while tracing, or where other processes hold a part of them."""
    if isinstance(array, jax.core.Tracer) or processes.spans(array):
        return None
    return np.asarray(array)


def _check_lengths(config: LlamaConfig, lengths: np.ndarray, width: int, max_new_tokens: int) -> None:
    for row in np.flatnonzero((lengths < 1) | (lengths > width)):
        empty = "an empty prompt: give at least one token, a BOS for instance"
        problem = empty if lengths[row] < 1 else f"longer than a row of tokens, which is {width}"
        raise InputError(f"lengths is {lengths[row]} in row {row}: {problem}")
    longest, context = int(lengths.max()), config.max_position_embeddings
    if longest + max_new_tokens > context:
        raise InputError(
            f"the prompt's {longest} tokens and max_new_tokens {max_new_tokens} need "
            f"{longest + max_new_tokens} positions; the model's context has {context}: shorten one of them"
        )


def _check_ids(config: LlamaConfig, ids: np.ndarray, lengths: np.ndarray) -> None:
    in_prompt = np.arange(ids.shape[1]) < lengths[:, None]
    invalid = np.argwhere(in_prompt & ((ids < 0) | (ids >= config.vocab_size)))
    if invalid.size:
        row, position = invalid[0]
        raise InputError(
            f"token id {ids[row, position]} in row {row}, position {position} is outside the vocabulary of "
            f"{config.vocab_size}; does the tokenizer belong to this model?"
        )


def random_key(seed: int) -> jax.Array:
    """A key from a seed of at most 64 bits.

    Raises:
      InputError: for any other seed.
    """
    try:
        return jax.random.key(np.int64(operator.index(seed)))
    except (TypeError, OverflowError):
        raise InputError(f"seed is {str(seed)[:40]}; it must be a whole number of at most 64 bits") from None


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """Stacks rows of ids of different lengths.

    Returns:
      tokens [B, T] int32, right-padded with 0, and their lengths [B] int32.

    Raises:
      InputError: for an id that int32 cannot represent.
    """
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), max(lengths)), np.int32)
    for row, ids in enumerate(rows):
        try:
            tokens[row, : len(ids)] = ids
        except OverflowError:
            raise InputError(
                f"row {row} has the token id {max(ids, key=abs)}, beyond any vocabulary; ids are below 2^31"
            ) from None
    return jax.device_put(tokens), jax.device_put(lengths)
