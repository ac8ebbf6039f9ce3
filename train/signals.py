"""Ctrl-C and SIGTERM: the first asks the loop to save and stop, a second Ctrl-C stops at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils


class Interrupts:
    """While entered, signals set flags that the loop reads between steps.

    Attributes:
      stop: the signal that asked this process to stop, or 0.
      profile: whether SIGUSR1 has asked for a profiler trace.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.profile = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed_stop(self) -> int:
        """The signal by which any process of the run was asked to stop, or 0; every process calls it."""
        if jax.process_count() == 1:
            return self.stop
        return int(np.max(multihost_utils.process_allgather(np.int32(self.stop))))

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.profile = True
        elif number == signal.SIGINT and self.stop:
            os.write(2, b"\nstopped without saving; the last checkpoint is where the run goes on\n")
            os._exit(128 + number)
        else:
            self.stop = number
            os.write(2, b"\nstopping after this step (Ctrl-C again: at once) ...\n")
