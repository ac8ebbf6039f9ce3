"""A key/value cache kept between generations of one row: only tokens that are not in it are run."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llama_jax import kv_cache as kv
from llama_jax.config import LlamaConfig
from llama_jax.decoding import arguments
from llama_jax.decoding.arguments import EosId
from llama_jax.decoding.constraints import Grammar
from llama_jax.decoding.generation import decode_loop_jit, unstack_jit
from llama_jax.decoding.sampling import Sampling
from llama_jax.decoding.state import DecodeState, init_state
from llama_jax.model import Params, compute_dtype


class Session:
    """Successive generations of one row that share a cache.

    A chat passes its whole history at every turn; only the part after the common prefix with the cache is
    run. The cache grows by powers of two as needed, up to the model's context.

    Attributes:
      tokens: the ids whose keys and values are in the cache.
      reused: the number of ids of the last prompt that were taken from the cache.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        *,
        cache_dtype: jax.typing.DTypeLike | None = None,
    ) -> None:
        """Starts with an empty cache.

        Args:
          config: the model.
          params: its parameters; stacked ones are unstacked once, which copies them.
          cache_dtype: dtype of the key/value cache, as for `generate`.

        Raises:
          InputError: for a dtype that a cache cannot have.
        """
        self._config = config
        self._params = unstack_jit(params)
        dtype = compute_dtype(params) if cache_dtype is None else cache_dtype
        self._dtype = kv.checked_dtype(dtype).name
        self._cache: kv.KVCache | None = None
        self._capacity = 0  # tokens that the cache was made for
        self._written = 0  # the most tokens in it since it was last written from its start on
        self._turn = 0
        self.tokens: list[int] = []
        self.reused = 0

    def stream(
        self,
        tokens: Sequence[int],
        key: jax.Array,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int,
        eos_id: EosId = None,
        grammar: Grammar | None = None,
    ) -> Iterator[int]:
        """Continues a prompt, one id at a time: the same ids as from `generate`.

        The iterator may be closed, or an exception thrown into it, at any time: the session then keeps the
        tokens run so far, or, if a step was interrupted, an empty cache. Another call of `stream` ends it.
        Over several processes each must make the same calls, and take and leave the same ids.

        Args:
          tokens: the whole prompt, at least one id.
          key: one key, as for `generate`.
          sampling: settings of one row.
          max_new_tokens: at least 1.
          eos_id: the end-of-sequence id or ids.
          grammar: what the continuation may be, as for `generate`.

        Returns:
          An iterator of new ids, the end-of-sequence token included.

        Raises:
          InputError: as `generate`, at the call; the cache is kept.
        """
        row = np.asarray(tokens)[None] if len(tokens) else np.zeros((1, 0), np.int32)
        lengths = np.array([len(tokens)], np.int32)
        request = arguments.prepare_request(
            self._config,
            row,
            lengths,
            sampling,
            eos_id,
            max_new_tokens,
            key=key,
            grammar=grammar,
            function="Session.stream",
        )
        return self._run(list(tokens), request, max_new_tokens)

    def _run(self, prompt: list[int], request: arguments.Request, max_new_tokens: int) -> Iterator[int]:
        self._turn += 1
        turn, capacity = self._turn, request.tokens.shape[1]
        cache, cached_tokens = self._release()
        if cache is None:
            cache, self._capacity = _empty_cache(self._config, capacity, self._dtype), capacity
        elif self._capacity < capacity:
            cache, self._capacity = _grow_cache(self._config, cache, capacity), capacity
        # The last id is always run, by the first step: its logits give the next token.
        self.reused = common_prefix_length(cached_tokens, prompt[:-1])
        self._written = max(self._written, len(cached_tokens))
        if not kv.can_resume(self._config, cache, self._written, self.reused):
            self.reused = 0
        if not self.reused:
            self._written = 0
        padded = np.zeros((1, self._capacity), np.int32)
        padded[0, : len(prompt)] = prompt
        state = _init_state(
            self._config,
            self._params,
            cache,
            padded,
            request.lengths,
            np.int32(self.reused),
            np.int32(len(prompt) - 1),
            request.key,
            request.sampling,
            request.eos_ids,
            np.int32(max_new_tokens),
            request.constraint,
        )
        run, last, done = prompt[:-1], prompt[-1], False
        self._cache, self.tokens = state.cache, run
        while not done and turn == self._turn:
            self._release()
            state, newest = decode_loop_jit(self._config, self._params, state, np.int32(1))
            token, done = int(np.asarray(newest.token)[0]), bool(np.asarray(newest.done)[0])
            run.append(last)
            self._cache, self.tokens = state.cache, run
            last = token
            yield token

    def _release(self) -> tuple[kv.KVCache | None, list[int]]:
        """Returns the cache and drops it: a step donates it, and may be interrupted before it returns."""
        released = self._cache, self.tokens
        self._cache, self.tokens = None, []
        return released


@functools.partial(jax.jit, static_argnames=("config", "capacity", "dtype"))
def _empty_cache(config: LlamaConfig, capacity: int, dtype: str) -> kv.KVCache:
    return kv.init_cache(config, 1, capacity, dtype)


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def _grow_cache(config: LlamaConfig, cache: kv.KVCache, capacity: int) -> kv.KVCache:
    return kv.grow(config, cache, capacity)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _init_state(config: LlamaConfig, params: Params, cache: kv.KVCache, *request: Any) -> DecodeState:
    return init_state(config, params, cache, *request, new_tokens=request[0].shape[1])


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of ids that two rows begin with alike."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
