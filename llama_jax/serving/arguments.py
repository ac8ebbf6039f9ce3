"""Checks of a request, and its arrays in the shapes that the programs are compiled for; numpy alone."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.decoding import constraints
from llama_jax.decoding.arguments import check_int
from llama_jax.decoding.constraints import Grammar
from llama_jax.decoding.sampling import Sampling
from llama_jax.errors import InputError
from llama_jax.serving.programs import one_row
from llama_jax.serving.requests import Request


class Sizes(NamedTuple):
    """The sizes that the programs are compiled for.

    Attributes:
      length: S, the cache's slots: of a prompt and its continuation.
      top_logprobs: n, the most likely tokens of a step.
      ids: I, the most ids of a setting.
      eos_ids: E, the most end-of-sequence ids.
    """

    length: int
    top_logprobs: int
    ids: int
    eos_ids: int = 16


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that has been checked.

    Attributes:
      tokens: int32 [S], the prompt, padded.
      length: its tokens.
      settings: the other arguments of `programs.join`.
      stop_ids: the end-of-sequence ids.
    """

    tokens: np.ndarray
    length: int
    settings: tuple[Any, ...]
    stop_ids: frozenset[int]


def prepare(request: Request, config: LlamaConfig, sizes: Sizes) -> Prepared:
    """Checks a request and pads its arrays.

    Args:
      request: the request.
      config: the model.
      sizes: of the batcher.

    Raises:
      InputError: for an empty prompt, an id outside the vocabulary, a setting out of range, more tokens,
        ids or log-probabilities than the batcher was made for, or a grammar of another vocabulary.
    """
    tokens = np.asarray(request.tokens)
    if tokens.ndim != 1 or not tokens.size:
        raise InputError(
            "the prompt is empty, or no list of token ids; give at least one id, a BOS for instance"
        )
    if tokens.dtype.kind not in "iu":
        raise InputError(f"the prompt's ids are {tokens.dtype}; they must be whole numbers")
    outside = np.flatnonzero((tokens < 0) | (tokens >= config.vocab_size))
    if outside.size:
        raise InputError(
            f"token id {tokens[outside[0]]} at position {outside[0]} is outside the vocabulary of "
            f"{config.vocab_size}; does the tokenizer belong to this model?"
        )
    limit = check_int("max_new_tokens", request.max_new_tokens)
    if tokens.size + limit > sizes.length:
        raise InputError(
            f"the prompt's {tokens.size} tokens and max_new_tokens {limit} need {tokens.size + limit} "
            f"positions; there are {sizes.length}: shorten one of them"
        )
    most = sizes.top_logprobs
    if check_int("top_logprobs", request.top_logprobs, minimum=0) > most:
        raise InputError(f"top_logprobs is {request.top_logprobs}; this batcher returns up to {most}")
    sampling = Sampling() if request.sampling is None else request.sampling
    sampling.check(1, config.vocab_size)
    for name in ("suppress_tokens", "forced_tokens"):
        if (size := np.asarray(getattr(sampling, name)).size) > sizes.ids:
            raise InputError(f"{name} holds {size} ids; this batcher was made with max_ids={sizes.ids}")
    if request.grammar is not None:
        if not isinstance(request.grammar, Grammar):
            kind = type(request.grammar).__name__
            raise InputError(f"grammar is a {kind}; make one with llama_jax.grammar(tokenizer, ...)")
        constraints.check(request.grammar.vocab_size, config.vocab_size, request.eos_id)
    padded = np.zeros(sizes.length, np.int32)
    padded[: tokens.size] = tokens
    eos_ids = _eos_ids(request.eos_id, sizes.eos_ids)
    return Prepared(
        tokens=padded,
        length=tokens.size,
        settings=(
            np.int32(limit),
            eos_ids,
            _key_data(request.key),
            np.int32(check_int("index", request.index, minimum=0)),
            one_row(sampling, sizes.ids),
        ),
        stop_ids=frozenset(eos_ids.tolist()) - {-1},
    )


def _eos_ids(eos_id: Any, most: int) -> np.ndarray:
    values = np.atleast_1d(np.asarray([] if eos_id is None else eos_id))
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise InputError(f"eos_id is {eos_id!r}; it must be a token id, a sequence of them, or None")
    if values.size > most:
        raise InputError(f"eos_id holds {values.size} ids; a request has up to {most}")
    padded = np.full(most, -1, np.int32)
    padded[: values.size] = values
    return padded


def _key_data(key: Any) -> np.ndarray:
    """The data of one key, of the default implementation."""
    key = jax.random.key(0) if key is None else key
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    data = np.asarray(key)
    expected = jax.random.key_data(jax.random.key(0)).shape
    if data.dtype != np.uint32 or data.shape != expected:
        raise InputError(f"key is {str(key)[:40]}; give one key, made with jax.random.key(seed)")
    return data
