"""Continuous batching: requests join and leave a batch of fixed size between steps of the device."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import jax

from llama_jax import kv_cache as kv
from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.decoding.arguments import check_int
from llama_jax.decoding.generation import unstack_jit
from llama_jax.decoding.state import PREFILL_CHUNKS
from llama_jax.errors import InputError, LlamaJaxError, QueueFullError
from llama_jax.model import Params, compute_dtype
from llama_jax.serving.arguments import Prepared, Sizes, prepare
from llama_jax.serving.engine import Engine, Totals
from llama_jax.serving.requests import FinishReason, Handle, Request, Result


class Batcher:
    """Generates for many requests at once, each of which gets what it would get alone.

    There are `batch_size` rows over one cache that is allocated once. Between two decoding steps of all rows,
    requests that have ended leave, and the next in the queue join: first come, first served. A prompt is run
    in chunks, 256 tokens or so between two steps, so that a long one does not stop the others. What it has in
    common with the text of any row, a system prompt or a chat's earlier turns, is copied and not run.

    Tokens are those of `generate` with the request's key, and log-probabilities equal up to the rounding of
    sums in another order (1e-6 in f32). After `warm_up` nothing is compiled, whatever the requests.

    Use it as a context manager, in which a thread drives the device; or without one, where `run`, or your own
    calls of `step`, drive it.

    ```python
    with lj.Batcher(model.config, model.params, batch_size=8) as batcher:
        handle = batcher.submit(lj.Request(tokens, max_new_tokens=64))
        for token in handle:
            print(token.id, token.logprob)
    ```

    Attributes:
      config: the model.
      batch_size: B.
      max_length: the most tokens of a prompt and its continuation.
      max_queue: the most requests that wait.
      top_logprobs: the most that a request may ask for.
    """

    def __init__(
        self,
        config: LlamaConfig,
        params: Params,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        max_queue: int | None = None,
        top_logprobs: int = 20,
        max_ids: int = 64,
        cache_dtype: jax.typing.DTypeLike | None = None,
        invariant: bool = False,
    ) -> None:
        """The cache, `batch_size` + 1 rows of `max_length`, is allocated with the first request or `warm_up`.

        Args:
          config: the model.
          params: its parameters, of one device; stacked ones are unstacked once, which copies them.
          batch_size: B, the rows.
          max_length: the most tokens of a prompt and its continuation; None is the model's context.
          max_queue: the most requests that wait for a row; None is no limit.
          top_logprobs: the most that a request may ask for.
          max_ids: the most ids in a request's `suppress_tokens` and `forced_tokens`, in multiples of 64.
          cache_dtype: dtype of the key/value cache, as for `generate`.
          invariant: no bit of a result depends on the other requests: every step runs all rows, and no
            prefix is shared. Otherwise a step runs 1, 4, 16, ... or all rows, as many as are needed.

        Raises:
          InputError: for a size that is out of range, or parameters on a mesh.
        """
        mesh = sharding.mesh_of(params)
        if mesh is not None:
            raise InputError(
                f"the parameters are on a mesh of {mesh.size} devices, and a batcher runs on one; load the "
                "model without a mesh, or call generate with a batch"
            )
        context = config.max_position_embeddings
        length = context if max_length is None else check_int("max_length", max_length, minimum=2)
        if length > context:
            raise InputError(f"max_length is {length}; the model's context has {context} positions")
        self.config = config
        self.batch_size = check_int("batch_size", batch_size)
        self.max_length = length
        self.max_queue = None if max_queue is None else check_int("max_queue", max_queue)
        self.top_logprobs = min(check_int("top_logprobs", top_logprobs, minimum=0), config.vocab_size)
        ids = -(-check_int("max_ids", max_ids) // 64) * 64
        dtype = kv.checked_dtype(compute_dtype(params) if cache_dtype is None else cache_dtype).name
        sizes = Sizes(length=length, top_logprobs=self.top_logprobs, ids=ids)
        params = unstack_jit(params)
        self._engine = Engine(config, params, sizes, self.batch_size, dtype, invariant, self._finish)
        self._queue: collections.deque[tuple[Handle, Prepared]] = collections.deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._seconds_per_request = 1.0

    @property
    def totals(self) -> Totals:
        """What was done so far."""
        return self._engine.totals

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests in rows, and the one whose prompt is being run."""
        return self._engine.running

    def submit(self, request: Request) -> Handle:
        """Queues a request; returns at once.

        Raises:
          InputError: for a request that cannot work.
          QueueFullError: if `max_queue` requests are waiting, or the batcher is closed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        """`submit` of all or, where one of them fails, of none."""
        prepared = [prepare(request, self.config, self._engine.sizes) for request in requests]
        handles = [Handle(request, self._wake) for request in requests]
        with self._changed:
            if self._closed:
                raise QueueFullError("the batcher is closed", retry_after=1)
            waiting, free = len(self._queue), self.batch_size - self.running
            if self.max_queue is not None and waiting + len(requests) > self.max_queue + free:
                seconds = self._seconds_per_request * (waiting + 1) / self.batch_size
                raise QueueFullError(
                    f"{waiting} requests are waiting, and the queue holds {self.max_queue}; try again later",
                    retry_after=int(min(max(seconds, 1), 60)),
                )
            self._queue += zip(handles, prepared, strict=True)
            self._changed.notify_all()
        return handles

    def run(self, requests: Iterable[Request]) -> list[Result]:
        """Runs requests to their end; returns the results in the order of the requests.

        Requests are taken as there is room for them, so that there may be any number.

        Raises:
          InputError: for a request that cannot work; those before it are cancelled.
        """
        handles: list[Handle] = []
        try:
            for request in requests:
                if self._thread is None:
                    while self.waiting >= self.batch_size:
                        self.step()
                else:
                    with self._changed:
                        self._changed.wait_for(lambda: self.waiting < self.batch_size)
                handles.append(self.submit(request))
            while self._thread is None and not all(handle.done for handle in handles):
                self.step()
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                if not handle.done:
                    handle.cancel()

    def __enter__(self) -> Batcher:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Starts the thread that drives the device."""
        if self._thread is None:
            self._closed = False
            self._thread = threading.Thread(target=self._loop, name="batcher", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Cancels every request and ends the thread; `start` begins anew."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._drop(lambda _: "cancelled")

    def warm_up(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Compiles every program, so that no later request does; before any is submitted.

        Args:
          progress: called with the number of programs that are compiled, and of all.

        Returns:
          The number of programs.
        """
        return self._engine.warm_up(progress)

    def step(self) -> bool:
        """Does the next piece of work: prompts for about 256 tokens, then decoding steps of all rows.

        For loops of your own, in one thread, without `start`. A step that fails ends all requests that are
        running with its error; those in the queue go on.

        Returns:
          Whether there was any.
        """
        engine, budget, worked = self._engine, PREFILL_CHUNKS[0], False
        try:
            self._drop(_verdict)
            while budget > 0 and (engine.has_prompt or self._admit()):
                budget -= engine.advance_prompt()
                worked = True
            if any(engine.rows):
                engine.take_steps()
                worked = True
        except BaseException as error:
            reason = error if isinstance(error, Exception) else LlamaJaxError("the step was interrupted")
            for handle in engine.reset():
                self._finish(handle, reason)
            if not isinstance(error, Exception):
                raise
            return True
        return worked

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue or self.running)
                if self._closed:
                    return
            self.step()

    def _admit(self) -> bool:
        """Takes the next request from the queue, if a row is free for it."""
        with self._changed:
            if not self._queue or None not in self._engine.rows:
                return False
            entry = self._queue.popleft()
            self._changed.notify_all()
        self._engine.admit(*entry)
        return True

    def _drop(self, verdict: Callable[[Handle], FinishReason | None]) -> None:
        """Ends the requests for which there is a verdict, in the queue and in rows."""
        with self._changed:
            entries = [(entry, verdict(entry[0])) for entry in self._queue]
            self._queue = collections.deque(entry for entry, reason in entries if reason is None)
        for (handle, _), reason in entries:
            if reason is not None:
                self._finish(handle, reason)
        self._engine.drop(verdict)

    def _finish(self, handle: Handle, reason: FinishReason | Exception) -> None:
        self.totals.requests += 1
        seconds = time.monotonic() - handle.submitted
        self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
        handle.finish(reason)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _verdict(handle: Handle) -> FinishReason | None:
    """Whether a request is cancelled, or out of time."""
    if handle.cancelled:
        return "cancelled"
    timeout = handle.request.timeout
    return "timeout" if timeout is not None and time.monotonic() - handle.submitted > timeout else None
