"""What a start of a run spends its time on, and its records for `llama_jax.eval.goodput`."""

from __future__ import annotations

import collections
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from llama_jax.errors import LlamaJaxError
from llama_jax.eval.goodput import GOODPUT_FILE, MEASURED, Goodput, account, read_records

from .append_file import AppendFile

_STEPS = 100  # whose median duration is the usual one


class Clock:
    """Seconds by activity since it was made, at every time on exactly one; `startup` at first.

    Attributes:
      start: time.time() when it was made.
      activity: the present one.
      moved: time.monotonic() of the last sign of progress: a change of activity, or a step that has ended.
      step_seconds: between the ends of the latest steps.
      waiting_for: what the main thread waits for within an activity, for messages.
    """

    def __init__(self) -> None:
        self.start, self.activity = time.time(), "startup"
        self.moved = self._since = time.monotonic()
        self._seconds = dict.fromkeys(MEASURED, 0.0)
        self.step_seconds: collections.deque[float] = collections.deque(maxlen=_STEPS)
        self.waiting_for = ""

    def switch(self, activity: str) -> None:
        """The time from now on is spent on this activity."""
        now = time.monotonic()
        self._seconds[self.activity] += now - self._since
        self.moved = self._since = now
        self.activity = activity

    def progress(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        self.step_seconds.append(now - self.moved)
        self.moved = now

    @contextlib.contextmanager
    def spend(self, activity: str) -> Iterator[None]:
        """The time of the block is spent on this activity."""
        before = self.activity
        self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def seconds(self) -> dict[str, float]:
        """By activity, up to now."""
        now = time.monotonic()
        return {
            name: value + (now - self._since) * (name == self.activity)
            for name, value in self._seconds.items()
        }

    def reassign(self, seconds: float, *, source: str, target: str) -> None:
        """Moves seconds from one activity to another."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds


class GoodputRecords:
    """Appends to RUN/goodput.jsonl as the run goes on, and at the end of this start, whatever ends it.

    A disk without space for it does not stop the run.

    Args:
      run_dir: the run's directory.
      clock: of this start.
      first: the step that this start resumes after.
      is_primary: whether this is process 0; the others write nothing.
    """

    def __init__(self, run_dir: Path, clock: Clock, *, first: int, is_primary: bool) -> None:
        self._clock = clock
        self._file = AppendFile(run_dir / GOODPUT_FILE) if is_primary else None
        self._earlier = read_records(run_dir) if is_primary else []  # of the starts before this one
        self._first = self._step = first
        self._end: dict[str, Any] | None = None  # the last record, after `finish`

    def __enter__(self) -> Self:
        self.write(self._first)
        return self

    def __exit__(self, *_: object) -> None:
        if self._end is None:
            self.write(self._step)
        if self._file is not None:
            with contextlib.suppress(LlamaJaxError):
                self._file.close()

    def write(self, step: int) -> None:
        """Appends how far this start has come."""
        self._step = step
        self._append(self._record())

    def finish(self, step: int, *, complete: bool) -> None:
        """Appends the last record: what comes after it is not counted.

        Args:
          step: the last step.
          complete: whether the run has no steps left.
        """
        self._step = step
        self._end = {**self._record(), "complete": complete}
        self._append(self._end)

    def _append(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            with contextlib.suppress(LlamaJaxError):
                self._file.append(json.dumps(record).encode() + b"\n")

    def goodput(self) -> Goodput | None:
        """Of all starts up to now; None in processes that do not write."""
        return None if self._file is None else account([*self._earlier, self._end or self._record()])

    def _record(self) -> dict[str, Any]:
        return {
            "start": self._clock.start,
            "time": time.time(),
            "first": self._first,
            "step": self._step,
            "seconds": {name: round(value, 3) for name, value in self._clock.seconds().items()},
        }
