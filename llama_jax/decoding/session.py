"""One row's key/value cache, kept between generations: a prompt runs only what the last did not share."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import kv_cache as kv
from llama_jax.config import LlamaConfig
from llama_jax.decoding import arguments
from llama_jax.decoding.arguments import EosId
from llama_jax.decoding.generation import advance_jit, unstacked
from llama_jax.decoding.sampling import Sampling
from llama_jax.decoding.state import DecodeState, begin
from llama_jax.model import Params, compute_dtype


class Session:
    """Generations of one row, one after the other, over one cache.

    A chat hands over its whole text at every turn; only the part after what the cache holds is run. The
    cache grows by powers of two as it is needed, up to the model's context.

    Attributes:
      tokens: the ids whose keys and values the cache holds.
      reused: of the last prompt, how many ids were not run again.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        *,
        cache_dtype: jax.typing.DTypeLike | None = None,
    ) -> None:
        """Begins with nothing.

        Args:
          config: the model.
          params: its parameters; stacked ones are unstacked once, which copies them.
          cache_dtype: what to hold keys and values in, as for `generate`.

        Raises:
          InputError: for a dtype that no cache has.
        """
        self._config = config
        self._params = unstacked(params)
        dtype = compute_dtype(params) if cache_dtype is None else cache_dtype
        self._dtype = kv.checked_dtype(dtype).name
        self._cache: kv.KVCache | None = None
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
    ) -> Iterator[int]:
        """Continues a prompt, an id at a time: the ids that `generate` would give.

        The iterator may be closed, or an exception thrown through it, at any moment: the session then holds
        what it had run, or, if it was interrupted in the middle of a step, nothing. Another call of `stream`
        ends it.

        Args:
          tokens: the whole prompt, at least one id.
          key: one key, as for `generate`.
          sampling: settings of one row.
          max_new_tokens: at least 1.
          eos_id: the id, or ids, that end the text.

        Returns:
          An iterator of new ids, the end token included.

        Raises:
          InputError: as `generate` does, at the call; nothing is lost by it.
        """
        row = np.asarray(tokens)[None] if len(tokens) else np.zeros((1, 0), np.int32)
        lengths = np.array([len(tokens)], np.int32)
        request = arguments.check(self._config, row, lengths, sampling, eos_id, max_new_tokens)
        return self._run(list(tokens), request, key, max_new_tokens)

    def _run(
        self, prompt: list[int], request: arguments.Request, key: jax.Array, max_new_tokens: int
    ) -> Iterator[int]:
        self._turn += 1
        turn, room = self._turn, request.tokens.shape[1]
        cache, held = self._release()
        if cache is None:
            cache = _empty(self._config, room, self._dtype)
        elif cache.length < room:
            cache = _grow(cache, room)
        room = cache.length
        # The last id is never taken from the cache: the first step runs it, to choose what follows.
        self.reused = _shared(held, prompt[:-1])
        padded = np.zeros((1, room), np.int32)
        padded[0, : len(prompt)] = prompt
        state = _begin(
            self._config,
            self._params,
            cache,
            padded,
            request.lengths,
            np.int32(self.reused),
            np.int32(len(prompt) - 1),
            key,
            request.sampling,
            request.eos_ids,
            np.int32(max_new_tokens),
        )
        run, last, done = prompt[:-1], prompt[-1], False
        self._cache, self.tokens = state.cache, run
        while not done and turn == self._turn:
            self._release()
            state = advance_jit(self._config, self._params, state, np.int32(1))
            token, done = int(np.asarray(state.token)[0]), bool(np.asarray(state.done)[0])
            run.append(last)
            self._cache, self.tokens = state.cache, run
            last = token
            yield token

    def _release(self) -> tuple[kv.KVCache | None, list[int]]:
        """Takes the cache for a step, which uses it up: whoever interrupts the step leaves nothing behind."""
        held = self._cache, self.tokens
        self._cache, self.tokens = None, []
        return held


@functools.partial(jax.jit, static_argnames=("config", "room", "dtype"))
def _empty(config: LlamaConfig, room: int, dtype: str) -> kv.KVCache:
    return kv.init_cache(config, 1, room, dtype)


@functools.partial(jax.jit, static_argnames=("room",))
def _grow(cache: kv.KVCache, room: int) -> kv.KVCache:
    """The same cache with free slots after it."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, room - size if axis == 2 else 0) for axis, size in enumerate(x.shape)])

    return jax.tree.map(pad, cache)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _begin(config: LlamaConfig, params: Params, cache: kv.KVCache, *request: Any) -> DecodeState:
    return begin(config, params, cache, *request, new_tokens=cache.length)


def _shared(held: Sequence[int], wanted: Sequence[int]) -> int:
    """How many ids two texts begin with in common."""
    count = 0
    for one, other in zip(held, wanted, strict=False):
        if one != other:
            break
        count += 1
    return count
