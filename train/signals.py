"""Ctrl-C and SIGTERM: the first asks the loop to save and stop, a second Ctrl-C stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import TracebackType
from typing import Self

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
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Python's own handlers wait while the main thread is in a step or the compiler. What the kernel
            # wakes is a pipe; a thread at its other end acts at once.
            self._undo = contextlib.ExitStack()
            ours, theirs = os.pipe()
            os.set_blocking(theirs, False)
            thread = threading.Thread(target=self._watch, args=(ours,), daemon=True)
            thread.start()
            self._undo.callback(thread.join)
            self._undo.callback(os.close, theirs)
            self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._undo.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def agreed_stop(self) -> int:
        """The signal by which any process of the run was asked to stop, or 0; every process calls it."""
        if jax.process_count() == 1:
            return self.stop
        return int(np.max(multihost_utils.process_allgather(np.int32(self.stop))))

    def _watch(self, pipe: int) -> None:
        with open(pipe, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                self._note(number[0])

    def _note(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self.profile = True
        elif number == signal.SIGINT and self.stop:
            os.write(2, b"\nstopped without saving; the last checkpoint is where the run goes on\n")
            os._exit(128 + number)
        elif number in (signal.SIGINT, signal.SIGTERM):
            self.stop = number
            os.write(2, b"\nstopping after this step (Ctrl-C again: at once) ...\n")
