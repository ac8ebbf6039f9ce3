"""What `generate` and its kin are handed: checked, padded and given one form before anything is traced.

What is known at the call is handled in numpy, and moved by `device_put`: an operation of JAX, `jnp.asarray`
too, would be compiled anew for each length.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.decoding.sampling import Sampling
from llama_jax.errors import InputError

EosId = int | Sequence[int] | jax.Array | None


class Request(NamedTuple):
    """Arguments of a generation that have been checked as far as they are known.

    Attributes:
      tokens: int32 [B, T], cleaned of what padding may hold; T is the capacity where that is known.
      lengths: int32 [B].
      sampling: settings of one value a row.
      eos_ids: int32 [E], padded with -1.
      longest: the longest prompt; None while tracing, or where other processes hold part of the lengths.
      capacity: slots of the cache, a power of two, for prompt and continuation together; None likewise.
    """

    tokens: jax.Array
    lengths: jax.Array
    sampling: Sampling
    eos_ids: jax.Array
    longest: int | None
    capacity: int | None


def check(
    config: LlamaConfig,
    tokens: Any,
    lengths: Any,
    sampling: Sampling | None,
    eos_id: EosId,
    max_new_tokens: int,
    *others: Any,
) -> Request:
    """Checks a generation's arguments.

    Args:
      config: the model.
      tokens: int [B, T].
      lengths: int [B].
      sampling: settings, or None for the defaults.
      eos_id: end tokens.
      max_new_tokens: at least 1.
      *others: further arguments; if anything in them is being traced, the request counts as traced.

    Raises:
      InputError: for values known now that cannot work.
    """
    sampling = Sampling() if sampling is None else sampling
    if jnp.ndim(tokens) != 2:
        raise InputError(f"tokens has shape {jnp.shape(tokens)}; it must be [batch, length]")
    batch, length = jnp.shape(tokens)
    if batch < 1 or length < 1:
        raise InputError(
            f"tokens has shape {(batch, length)}; a prompt needs at least one token (a BOS, say)"
        )
    if jnp.shape(lengths) != (batch,):
        raise InputError(f"lengths has shape {jnp.shape(lengths)}; it must be [{batch}], one a row of tokens")
    for name, array in (("tokens", tokens), ("lengths", lengths)):
        if not jnp.issubdtype(jnp.result_type(array), jnp.integer):
            raise InputError(f"{name} is {jnp.result_type(array)}; it must be whole numbers")
    whole_number("max_new_tokens", max_new_tokens)
    sampling.check(batch, config.vocab_size)
    ids, counts = known(tokens), known(lengths)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((sampling, eos_id, others)))
    longest = None
    if counts is not None:
        _check_lengths(config, counts, length, int(max_new_tokens))
        if ids is not None:
            _check_ids(config, ids, counts)
            longest = None if traced else int(counts.max())
    room = None if longest is None else capacity(longest + max_new_tokens)
    if ids is not None:
        # Clipped, since padding may be any number, which int32 may not hold.
        ids = np.clip(ids, -1, 2**31 - 1).astype(np.int32)
        ids = ids if room is None else np.pad(ids[:, :longest], ((0, 0), (0, room - (longest or 0))))
        tokens = jax.device_put(ids)
    counts = lengths if counts is None else jax.device_put(counts.astype(np.int32))
    return Request(
        tokens=jnp.asarray(tokens, jnp.int32),
        lengths=jnp.asarray(counts, jnp.int32),
        sampling=sampling.rows(batch),
        eos_ids=end_ids(eos_id),
        longest=longest,
        capacity=room,
    )


def capacity(length: int) -> int:
    """The slots given to a text of up to `length` tokens: the next power of two, at least 128."""
    return max(128, 1 << (length - 1).bit_length())


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """`value`, if it is a whole number of at least `least`.

    Raises:
      InputError: if not.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise InputError(f"{name} is {value!r}; it must be a whole number, at least {least}")
    return int(value)


def end_ids(eos_id: EosId) -> jax.Array:
    """End tokens as an array of 8, or 16, ..., so that their number does not recompile anything.

    Raises:
      InputError: for what is neither a whole number nor a sequence of them.
    """
    if isinstance(eos_id, jax.core.Tracer):
        ids = jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32))
        return jnp.pad(ids, (0, -ids.size % 8), constant_values=-1)
    known = np.atleast_1d(np.asarray([] if eos_id is None else eos_id))
    if known.ndim != 1 or (known.size and known.dtype.kind not in "iu"):
        raise InputError(f"eos_id is {eos_id!r}; it must be a token id, a sequence of them, or None")
    padded = np.full(max(8, -(-known.size // 8) * 8), -1, np.int32)
    padded[: known.size] = known
    return jax.device_put(padded)


def row_keys(key: jax.Array, batch: int) -> jax.Array:
    """One typed key a row, from one key or from B of them; raw uint32 keys are taken too.

    Raises:
      InputError: for another number of keys, or what is no key.
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.ndim not in (1, 2):
            raise InputError(f"key is {key.dtype} of shape {key.shape}; make one with jax.random.key(seed)")
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise InputError(f"key has shape {key.shape}; give one key, or one for each of {batch} rows")
    return key


def known(array: Any) -> np.ndarray | None:
    """The numbers, or None while tracing, or where other processes hold part of them."""
    traced = isinstance(array, jax.core.Tracer)
    if traced or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return None
    return np.asarray(array)


def _check_lengths(config: LlamaConfig, lengths: np.ndarray, width: int, max_new_tokens: int) -> None:
    for row in np.flatnonzero((lengths < 1) | (lengths > width)):
        empty = "an empty prompt: give at least one token, a BOS for instance"
        why = empty if lengths[row] < 1 else f"longer than tokens, which holds {width} a row"
        raise InputError(f"lengths is {lengths[row]} in row {row}: {why}")
    longest, context = int(lengths.max()), config.max_position_embeddings
    if longest + max_new_tokens > context:
        raise InputError(
            f"the prompt's {longest} tokens and max_new_tokens {max_new_tokens} need "
            f"{longest + max_new_tokens} positions; the model's context has {context}: shorten one of them"
        )


def _check_ids(config: LlamaConfig, ids: np.ndarray, lengths: np.ndarray) -> None:
    in_prompt = np.arange(ids.shape[1]) < lengths[:, None]
    bad = np.argwhere(in_prompt & ((ids < 0) | (ids >= config.vocab_size)))
    if bad.size:
        row, at = bad[0]
        raise InputError(
            f"token id {ids[row, at]} in row {row}, position {at} is outside the vocabulary of "
            f"{config.vocab_size}; does the tokenizer belong to this model?"
        )


def random_key(seed: int) -> jax.Array:
    """A key from a seed of at most 64 bits.

    Raises:
      InputError: if it is none.
    """
    try:
        return jax.random.key(np.int64(operator.index(seed)))
    except (TypeError, OverflowError):
        what = "a whole number of at most 64 bits"
        raise InputError(f"seed is {str(seed)[:40]}; it must be {what}") from None


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
    """Lays ragged rows of ids side by side.

    Returns:
      tokens [B, T] int32, right-padded with 0, and their lengths [B] int32.

    Raises:
      InputError: for an id that no vocabulary has.
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
