"""Signal handling: the first Ctrl-C or SIGTERM saves and stops, a second Ctrl-C exits immediately."""

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
    """A context in which signals set flags that the loop reads between steps.

    Attributes:
      stop: the last SIGINT or SIGTERM that this process received, or 0.
      profile: whether SIGUSR1 has requested a profiler trace.
    """

    def __init__(self) -> None:
        self.stop = 0
        self.profile = False
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Python runs signal handlers in the main thread only, when a step or a compilation has returned.
            # The wakeup descriptor is written immediately, and a thread at the pipe's other end reacts.
            self._cleanup = contextlib.ExitStack()
            read_end, write_end = os.pipe()
            os.set_blocking(write_end, False)
            thread = threading.Thread(target=self._watch, args=(read_end,), daemon=True)
            thread.start()
            self._cleanup.callback(thread.join)
            self._cleanup.callback(os.close, write_end)
            self._cleanup.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_end))
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._cleanup.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def agreed_stop(self) -> int:
        """The signal that any process of the run received, or 0; a collective: every process must call it."""
        if jax.process_count() == 1:
            return self.stop
        return int(np.max(multihost_utils.process_allgather(np.int32(self.stop))))

    def _watch(self, pipe: int) -> None:
        with open(pipe, "rb", buffering=0) as signal_numbers:
            while number := signal_numbers.read(1):
                self._handle(number[0])

    def _handle(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self.profile = True
        elif number == signal.SIGINT and self.stop:
            os.write(2, b"\nstopped without saving; the run resumes from its last checkpoint\n")
            os._exit(128 + number)
        elif number in (signal.SIGINT, signal.SIGTERM):
            self.stop = number
            os.write(2, b"\nstopping after this step (Ctrl-C again to exit immediately) ...\n")
