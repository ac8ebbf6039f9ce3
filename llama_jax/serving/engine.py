"""The rows of a `Batcher` on the device: one request joins, all take a step, those that have ended leave.

No queue and no thread: `Batcher` has those.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from llama_jax import kv_cache as kv
from llama_jax.config import LlamaConfig
from llama_jax.decoding.constraints import FREE, Grammar
from llama_jax.decoding.state import PREFILL_CHUNKS, DecodeState
from llama_jax.errors import InputError
from llama_jax.model import Params
from llama_jax.serving import programs
from llama_jax.serving.arguments import Prepared, Sizes, prepare
from llama_jax.serving.grammar_tables import GrammarTables
from llama_jax.serving.prefixes import HeldTokens
from llama_jax.serving.requests import FinishReason, Handle, Request, Token

STEPS = 4
"""Decoding steps that are taken at once while every row is busy, so that nobody could join between them."""
_NOT_FINITE = (
    "the logits are not finite: the weights hold NaN or infinity, or the activations overflow; take a fresh "
    "copy of the weights, or use float32 or bfloat16"
)

Verdict = FinishReason | Exception | None


@dataclasses.dataclass
class Totals:
    """What was done since the batcher was made.

    Attributes:
      requests: requests that have ended.
      prompt_tokens: tokens of prompts that joined.
      shared_tokens: those of them that were copied from another row.
      new_tokens: generated tokens.
      steps: decoding steps.
    """

    requests: int = 0
    prompt_tokens: int = 0
    shared_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0


@dataclasses.dataclass
class _Prompt:
    """The request whose prompt is being run, and the chunks (start, size) that are left."""

    handle: Handle
    prepared: Prepared
    chunks: collections.deque[tuple[int, int]]


class Engine:
    """B rows, and the cache of one row in which prompts are run.

    Attributes:
      config, params: the model, its layers unstacked.
      sizes: that the programs are compiled for.
      rows: the request of each row, or None.
      totals: what was done.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        sizes: Sizes,
        batch_size: int,
        cache_dtype: str,
        invariant: bool,
        finish: Callable[[Handle, FinishReason | Exception], None],
    ) -> None:
        """`finish` is called with each request that ends, and why; for `invariant` see `Batcher`."""
        self.config, self.params, self.sizes = config, params, sizes
        self.batch_size = batch_size
        self.totals = Totals()
        self._dtype = cache_dtype
        self._shares = not invariant
        # The rows that may be run at once: few programs, and few rows that are run for nothing.
        fewer = [4**n for n in range(8) if 4**n < batch_size and not invariant]
        self._row_counts = (*fewer, batch_size)
        self._finish = finish
        self._chunks = tuple(min(size, sizes.length) for size in PREFILL_CHUNKS)
        device = next(iter(jax.tree.leaves(params)[0].devices()))
        self._decode = programs.decode_program(device.platform)
        self.reset()

    def reset(self) -> list[Handle]:
        """Forgets all rows, which a step that failed may have lost; returns their requests."""
        lost = self.handles() if hasattr(self, "rows") else []
        count = self.batch_size + 1  # the cache of one row comes last
        self.rows: list[Handle | None] = [None] * self.batch_size
        self._prompt: _Prompt | None = None
        self._state: DecodeState | None = None
        self._cache: kv.KVCache | None = None
        self._newest = [0] * self.batch_size  # sampled, but not run
        self._stop_ids: list[frozenset[int]] = [frozenset()] * self.batch_size
        self._held = HeldTokens(count, self.sizes.length)
        self._tables = GrammarTables(self.batch_size)
        # The most positions that were run since a row was last run from its start (`kv_cache.can_resume`).
        self._written = np.zeros(count, np.int64)
        return lost

    @property
    def has_prompt(self) -> bool:
        """Whether a prompt is being run."""
        return self._prompt is not None

    @property
    def running(self) -> int:
        """Requests in rows, and the one whose prompt is being run."""
        return self.batch_size - self.rows.count(None) + self.has_prompt

    def handles(self) -> list[Handle]:
        """The requests that are running."""
        return [*([self._prompt.handle] if self._prompt else []), *filter(None, self.rows)]

    def drop(self, verdict: Callable[[Handle], FinishReason | None]) -> None:
        """Ends the requests for which there is a verdict; their rows are free."""
        if self._prompt is not None and (reason := verdict(self._prompt.handle)):
            handle, self._prompt = self._prompt.handle, None
            self._finish(handle, reason)
        for row, there in enumerate(self.rows):
            if there is not None and (reason := verdict(there)):
                self.rows[row] = None
                self._finish(there, reason)

    def warm_up(self, progress: Callable[[int, int], None] | None) -> int:
        """Compiles every program; returns their number. See `Batcher.warm_up`."""
        zero, ids = np.int32(0), np.zeros(self.sizes.length, np.int32)
        settings = prepare(Request([0], max_new_tokens=1), self.config, self.sizes).settings
        state, cache = self._on_device()
        sizes = sorted(set(self._chunks))
        done, number = 0, len(sizes) + 3 + len(self._row_counts)

        def count() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, number)

        for size in sizes:
            cache = programs.prefill_chunk(self.config, self.params, cache, ids[None, :size], zero, zero)
            count()
        cache = programs.copy_prefix(cache, state.cache, zero, zero)
        count()
        state = programs.join(state, cache, zero, ids, np.int32(1), *settings, np.int32(FREE))
        count()
        state = programs.move(state, zero, zero)
        count()
        for rows in self._row_counts:
            state, _ = self._steps(state, rows, steps=0, with_top=False)
            count()
        self._state, self._cache = state, cache
        return number

    def admit(self, handle: Handle, prepared: Prepared) -> None:
        """Begins a prompt, with what some row already holds of it. There is no other, and a free row."""
        state, cache = self._on_device()
        prompt = prepared.tokens[: prepared.length - 1]
        row, shared = self._longest_prefix(prompt, cache)
        if shared and row < self.batch_size:
            self._cache = None
            self._cache = programs.copy_prefix(cache, state.cache, np.int32(row), np.int32(shared))
        self._written[self.batch_size] = self._written[row] if shared else 0
        self._held.set(self.batch_size, prompt[:shared])
        handle.shared_tokens = shared
        self._prompt = _Prompt(handle, prepared, self._plan(shared, len(prompt)))

    def advance_prompt(self) -> int:
        """Runs one chunk of the prompt; after the last it joins. Returns how many tokens were run."""
        assert self._prompt is not None
        prompt, prepared, size = self._prompt, self._prompt.prepared, 0
        if prompt.chunks:
            _, cache = self._on_device()
            start, size = prompt.chunks.popleft()
            stop = min(start + size, prepared.length - 1)
            ids = np.zeros((1, size), np.int32)
            ids[0, : stop - start] = prepared.tokens[start:stop]
            at = np.int32(start), np.int32(prepared.length - 1)
            self._cache = None
            self._cache = programs.prefill_chunk(self.config, self.params, cache, ids, *at)
            self._held.set(self.batch_size, prepared.tokens[:stop])
            self._written[self.batch_size] = max(self._written[self.batch_size], stop)
        if not prompt.chunks:
            self._join(prompt.handle, prepared)
        return size

    def take_steps(self) -> None:
        """Takes a decoding step of all requests, or several; gives them the tokens."""
        rows = self._compact()
        state, _ = self._on_device()
        with_top = any(there is not None and there.request.top_logprobs > 0 for there in self.rows)
        steps = 1 if None in self.rows else STEPS
        self._state = None
        self._state, found = self._steps(state, rows, steps=steps, with_top=with_top)
        tokens, live, logprobs = (np.asarray(x) for x in found[:3])
        top = [np.asarray(x) for x in found[3:]] if with_top else None
        self.totals.steps += int(live.any(1).sum())
        for row, handle in enumerate(self.rows[:rows]):
            if handle is None:
                continue
            count, wanted = int(live[:, row].sum()), handle.request.top_logprobs
            likely: list[Any] = [()] * count
            if top is not None and wanted:
                columns = (x[:count, row, :wanted].tolist() for x in top)
                likely = [tuple(zip(*step, strict=True)) for step in zip(*columns, strict=True)]
            new = map(Token, tokens[:count, row].tolist(), logprobs[:count, row].tolist(), likely)
            self._deliver(row, handle, list(new))

    def _steps(
        self, state: DecodeState, rows: int, *, steps: int, with_top: bool
    ) -> tuple[DecodeState, programs.Steps]:
        stopped = np.array([there is None for there in self.rows[:rows]])
        at = stopped, np.int32(steps), np.asarray(with_top)
        most = {"rows": rows, "most_steps": STEPS, "num_top": self.sizes.top_logprobs}
        return self._decode(self.config, self.params, state, *at, **most)

    def _rows_for(self, requests: int) -> int:
        """How many rows are run for a number of requests."""
        return next(rows for rows in self._row_counts if rows >= requests)

    def _compact(self) -> int:
        """Moves requests to the first rows, as many as are run; returns how many these are."""
        live = [row for row, there in enumerate(self.rows) if there is not None]
        count = self._rows_for(len(live))
        for row in reversed(live):
            if row < count:
                break
            to = self._free_row(count)
            self._move(row, to)
            self.rows[to], self.rows[row] = self.rows[row], None
            self._newest[to], self._stop_ids[to] = self._newest[row], self._stop_ids[row]
            self._held.forget(row)
        return count

    def _free_row(self, count: int) -> int:
        """Of the first rows one that is free; what it holds is kept in a later one, if one is free."""
        free = [row for row, there in enumerate(self.rows) if there is None]
        row = self._held.oldest([row for row in free if row < count])
        later = [other for other in free if other >= count]
        if later and self._held.length[row] and self._shares:
            self._move(row, self._held.oldest(later))
        return row

    def _move(self, row: int, to: int) -> None:
        """Copies a row of the cache and its state to another."""
        state, _ = self._on_device()
        self._state = None
        self._state = programs.move(state, np.int32(row), np.int32(to))
        self._held.copy(row, to)
        self._written[to] = self._written[row]

    def _longest_prefix(self, prompt: np.ndarray, cache: kv.KVCache) -> tuple[int, int]:
        """The row that holds the longest prefix of a prompt from which it can be resumed; and its length."""
        common = self._held.common(prompt) if self._shares else np.zeros(self.batch_size + 1, int)
        for row in sorted(range(len(common)), key=lambda row: (-common[row], -row)):
            shared = int(common[row])
            # Of a row, the device may have run some tokens more.
            written = int(self._written[row]) + STEPS * (row < self.batch_size)
            if not shared or kv.can_resume(self.config, cache, written, shared):
                return row, shared
        return self.batch_size, 0

    def _plan(self, start: int, stop: int) -> collections.deque[tuple[int, int]]:
        """The chunks (position, size) that run start..stop-1, as `prefill_cache` has them."""
        large, small = self._chunks
        chunks: collections.deque[tuple[int, int]] = collections.deque()
        while start < stop:
            size = large if stop - start > large // 2 else small
            # Clamped to the end: the last chunk may overlap the one before it, and writes the same values.
            chunks.append((min(start, self.sizes.length - size), size))
            start += size
        return chunks

    def _join(self, handle: Handle, prepared: Prepared) -> None:
        requests = sum(there is not None for there in self.rows)
        row = self._free_row(self._rows_for(requests + 1))
        state, cache = self._on_device()
        self._state = None
        grammar, state = self._with_grammar(state, handle.request.grammar)
        at = np.int32(row), prepared.tokens, np.int32(prepared.length)
        self._state = programs.join(state, cache, *at, *prepared.settings, np.int32(grammar))
        self._held.set(row, prepared.tokens[: prepared.length - 1])
        self._written[row] = self._written[self.batch_size]
        self._newest[row] = int(prepared.tokens[prepared.length - 1])
        self._stop_ids[row] = prepared.stop_ids
        self._prompt, self.rows[row] = None, handle
        self.totals.prompt_tokens += prepared.length
        self.totals.shared_tokens += handle.shared_tokens

    def _with_grammar(self, state: DecodeState, grammar: Grammar | None) -> tuple[int, DecodeState]:
        """The place of a grammar, and the state with it; without one, if no other row has any.

        Rows without grammars run the programs that were compiled for them.
        """
        used = [one for there in self.rows if there is not None and (one := there.request.grammar)]
        if grammar is None:
            constraint, place = state.constraint if used else None, FREE
        else:
            place, constraint = self._tables.place(grammar, state.constraint, used)
        return place, dataclasses.replace(state, constraint=constraint)

    def _deliver(self, row: int, handle: Handle, tokens: list[Token]) -> None:
        """Gives new tokens to a request, and ends it where one of them does."""
        new, verdict = [], None
        for token in tokens:
            verdict = self._verdict(row, handle, token)
            if not isinstance(verdict, Exception):
                new.append(token)
                self._held.append(row, self._newest[row])
                self._written[row] = max(self._written[row], self._held.length[row])
                self._newest[row] = token.id
            if verdict is not None:
                break
        handle.push(new)
        self.totals.new_tokens += len(new)
        if verdict is None and handle.generated >= handle.request.max_new_tokens:
            verdict = "length"
        if verdict is not None:
            self.rows[row] = None
            self._finish(handle, verdict)

    def _verdict(self, row: int, handle: Handle, token: Token) -> Verdict:
        """Whether a token ends its request."""
        if np.isnan(token.logprob):
            return InputError(_NOT_FINITE)
        follow = handle.request.follow
        try:
            ended = follow is not None and follow(token)
        except Exception as error:  # of one request: the others go on
            return error
        return "stop" if ended or token.id in self._stop_ids[row] else None

    def _on_device(self) -> tuple[DecodeState, kv.KVCache]:
        """The rows, and the cache of one row; new ones at first, and after a step that failed."""
        if self._state is None or self._cache is None:
            sizes: dict[str, Any] = {"length": self.sizes.length, "dtype": self._dtype}
            ids = {"num_ids": self.sizes.ids, "num_eos": self.sizes.eos_ids}
            self._state = programs.init_rows(self.config, self.batch_size, **sizes, **ids)
            self._cache = programs.init_prompt_cache(self.config, **sizes)
        return self._state, self._cache
