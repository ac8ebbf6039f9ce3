"""A request of a `Batcher`, the handle by which its tokens are read, and its result."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax

from llama_jax.decoding.arguments import EosId
from llama_jax.decoding.constraints import Grammar
from llama_jax.decoding.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


class Token(NamedTuple):
    """A generated token.

    Attributes:
      id: its id.
      logprob: its log-probability, as in `GenerateOutput.logprobs`.
      top: the most likely tokens of its step and their log-probabilities, in descending order.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and how to continue it; what the fields share with `generate` is documented there.

    Attributes:
      tokens: the prompt's ids, at least one.
      max_new_tokens: at least 1.
      sampling: settings of one row; None is temperature 1 and nothing else.
      eos_id: the end-of-sequence id or ids.
      key: one key; None is `jax.random.key(0)`.
      index: the tokens are those of row `index` of `generate` with this key: of several continuations of one
        prompt, each has its own.
      top_logprobs: the number of most likely tokens to return per step.
      grammar: what the continuation may be (`llama_jax.grammar`); it needs `eos_id`.
      timeout: seconds after which the request ends, in the queue too; None is no limit.
      follow: called with each new token, in order, by the thread that drives the device: to be quick. True
        ends the request, as a stop string does.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    sampling: Sampling | None = None
    eos_id: EosId = None
    key: jax.Array | None = None
    index: int = 0
    top_logprobs: int = 0
    grammar: Grammar | None = None
    timeout: float | None = None
    follow: Callable[[Token], bool] | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """What a request has come to.

    Attributes:
      tokens: the new ids, an end-of-sequence token included.
      logprobs: the log-probability of each.
      top: `Token.top` of each.
      finish_reason: `stop` after an end-of-sequence token, or where `follow` ended it; `length` at
        `max_new_tokens`; `cancelled`; or `timeout`.
      prompt_tokens: the prompt's length.
      shared_tokens: how many of these were copied from another row instead of run.
      seconds_to_first: from `submit` to the first token; NaN without one.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[tuple[tuple[int, float], ...]]
    finish_reason: FinishReason
    prompt_tokens: int
    shared_tokens: int
    seconds_to_first: float


class Handle:
    """A submitted request: its tokens as they come, and its end. Safe to use from any thread.

    The batcher never waits for a reader: tokens that are not read stay here, as many as `max_new_tokens`.
    """

    def __init__(self, request: Request, wake: Callable[[], None]) -> None:
        """`Batcher.submit` makes it; `wake` tells the batcher of a cancellation."""
        self.request = request
        self.submitted = time.monotonic()
        self.shared_tokens = 0
        self.cancelled = False
        self._wake = wake
        self._changed = threading.Condition()
        self._tokens: list[Token] = []
        self._taken = 0
        self._first = math.nan
        self._reason: FinishReason | None = None
        self._error: Exception | None = None
        self._listener: Callable[[], object] | None = None

    def cancel(self) -> None:
        """Ends the request; its row is free before the next step."""
        self.cancelled = True
        self._wake()

    @property
    def seconds_to_first(self) -> float:
        """From `submit` to the first token; NaN before it."""
        return self._first - self.submitted

    @property
    def generated(self) -> int:
        """The number of tokens so far."""
        return len(self._tokens)

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._reason is not None or self._error is not None

    def __iter__(self) -> Iterator[Token]:
        """The tokens as they come, until the request ends; raises what made it fail."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._taken < len(self._tokens) or self.done)
                new = self._take()
            if not new:
                return
            yield from new

    async def __aiter__(self) -> AsyncIterator[Token]:
        """The same in an event loop, which is not blocked."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        self.listen(lambda: loop.call_soon_threadsafe(news.set))
        while True:
            news.clear()
            with self._changed:
                ended, new = self.done, self._take()
            for token in new:
                yield token
            if not new and ended:
                return
            if not new:
                await news.wait()

    def listen(self, listener: Callable[[], object]) -> None:
        """Has `listener`, and no other, called after each change, by the thread that drives the device."""
        with self._changed:
            self._listener = listener

    def result(self, timeout: float | None = None) -> Result:
        """Waits for the end of the request.

        Args:
          timeout: seconds to wait; None is no limit.

        Raises:
          TimeoutError: if it has not ended by then.
          Exception: what made the request fail.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._reason is not None
        return Result(
            tokens=[token.id for token in self._tokens],
            logprobs=[token.logprob for token in self._tokens],
            top=[token.top for token in self._tokens],
            finish_reason=self._reason,
            prompt_tokens=len(self.request.tokens),
            shared_tokens=self.shared_tokens,
            seconds_to_first=self.seconds_to_first,
        )

    def push(self, tokens: Sequence[Token]) -> None:
        """For the batcher: adds tokens."""
        with self._changed:
            if not self._tokens:
                self._first = time.monotonic()
            self._tokens += tokens
            self._tell()

    def finish(self, reason: FinishReason | Exception) -> None:
        """For the batcher: ends the request."""
        with self._changed:
            if isinstance(reason, Exception):
                self._error = reason
            else:
                self._reason = reason
            self._tell()

    def _take(self) -> list[Token]:
        new = self._tokens[self._taken :]
        self._taken = len(self._tokens)
        if not new and self._error is not None:
            raise self._error
        return new

    def _tell(self) -> None:
        self._changed.notify_all()
        if self._listener is not None:
            with contextlib.suppress(RuntimeError):  # its event loop is closed
                self._listener()
