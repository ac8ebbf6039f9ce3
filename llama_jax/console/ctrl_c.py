"""Ctrl-C for a whole program: never a traceback, never swallowed, whatever runs when it arrives.

Python raises KeyboardInterrupt between any two bytecodes. Within an import that leaves half a module, which
some extension reports as an ImportError or crashes on; within a callback whose exceptions are only printed,
such as the one that JAX has Python's garbage collector call, the program would go on.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

STATUS = 128 + signal.SIGINT
_RETRY_SECONDS = 0.02


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Raises KeyboardInterrupt in the block as Python does, but after imports, and again if it is swallowed.

    A second Ctrl-C while an import holds up the first ends the process at once. Does nothing where SIGINT is
    ignored or handled by another, and outside the main thread.
    """
    handler = _Handler()
    try:
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual:
            signal.signal(signal.SIGINT, handler)
    except ValueError:  # not the main thread
        usual = False
    if not usual:
        yield
        return
    hook = sys.unraisablehook

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        if args.exc_type is KeyboardInterrupt:
            handler.retry()
        else:
            hook(args)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        if sys.unraisablehook is unraisable:  # else another wraps it, which may have to last
            sys.unraisablehook = hook
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if handler.waiting:
            raise KeyboardInterrupt


def exit_from_now_on() -> None:
    """Makes Ctrl-C end the process at once: its work is done, and its status about to be returned."""
    with contextlib.suppress(ValueError):
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda *_: os._exit(STATUS))


class _Handler:
    """Handles SIGINT: raises KeyboardInterrupt, unless an import is in progress."""

    def __init__(self) -> None:
        self.waiting = False  # for an import to end
        self._simulated = 0  # signals on their way that are our own

    def __call__(self, number: int, frame: FrameType | None) -> None:
        is_second = self.waiting and not self._simulated
        self._simulated = max(self._simulated - 1, 0)
        if not _importing(frame):
            self.waiting = False
            raise KeyboardInterrupt
        if is_second:
            os._exit(STATUS)
        self.waiting = True
        self.retry()

    def retry(self) -> None:
        """Sends another SIGINT shortly, when what is running may have returned."""
        main = _thread.get_ident()

        def run() -> None:
            time.sleep(_RETRY_SECONDS)
            self._simulated += 1
            signal.pthread_kill(main, signal.SIGINT)  # interrupts a system call too

        _thread.start_new_thread(run, ())  # `threading` has locks that the interrupted code may hold


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
