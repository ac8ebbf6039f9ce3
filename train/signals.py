"""Signal handling: the first Ctrl-C, SIGTERM or SIGHUP saves and stops, a second Ctrl-C exits immediately."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import TracebackType
from typing import Self

from .coordination import Agreement

FAILED = 255  # in place of a signal: a process cannot go on, and asks the others to save and stop with it
REFUSED = 254  # the same, and would fail again
SAVE = "save"  # the event that a checkpoint is due by the clock of process 0
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """A context in which signals set flags that the loop reads between steps.

    Args:
      agreement: with the other processes of the run.

    Attributes:
      stop: the last SIGINT, SIGTERM or SIGHUP (the terminal was closed) that this process received, or 0.
      profile: whether SIGUSR1 has requested a profiler trace.
      save_is_due: whether `SAVE` was agreed on at the last call of `agreed_stop`.
    """

    def __init__(self, agreement: Agreement | None = None) -> None:
        self.agreement = Agreement() if agreement is None else agreement
        self.stop = 0
        self.profile = False
        self.save_is_due = False
        self._agreed = 0
        self._asked_to_save = self._failed = False
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
            for number in (*_STOPS, signal.SIGUSR1):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # as `nohup` wants it
                self._cleanup.callback(signal.signal, number, signal.signal(number, lambda *_: None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def agreed_stop(self) -> int:
        """The signal that any process of the run received, FAILED or REFUSED if one has, or 0.

        Every process must call it equally often: all return the signal at the same call, and from then on.
        """
        events = self.agreement.poll()
        self.save_is_due = SAVE in events
        self._asked_to_save &= not self.save_is_due
        stops = [int(event.partition(" ")[2]) for event in events if event.startswith("stop ")]
        self._agreed = self._agreed or max(stops, default=0)
        return self._agreed

    def ask_to_save(self) -> None:
        """Asks all processes to save a checkpoint after the same step; once until they do."""
        if not self._asked_to_save:
            self._asked_to_save = True
            self.agreement.request(SAVE)

    def fail(self, *, transient: bool = True) -> None:
        """Asks all processes to save and stop, as this one cannot go on; once.

        Args:
          transient: whether the reason may pass.
        """
        if not self._failed:
            self._failed = True
            self.agreement.request(f"stop {FAILED if transient else REFUSED}")

    def _watch(self, pipe: int) -> None:
        with open(pipe, "rb", buffering=0) as signal_numbers:
            while number := signal_numbers.read(1):
                self._handle(number[0])

    def _handle(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self.profile = True
        elif number == signal.SIGINT and self.stop:
            _say(b"\nstopped without saving; the run resumes from its last checkpoint\n")
            os._exit(128 + number)
        elif number in _STOPS:
            self.stop = number
            self.agreement.request(f"stop {number}")
            _say(b"\nstopping after this step (Ctrl-C again to exit immediately) ...\n")


def _say(text: bytes) -> None:
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(2, text)
