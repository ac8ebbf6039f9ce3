"""Ends every process of a run when one of them fails, each with that one's reason.

JAX ends the others of a process that has died, after its heartbeat. One that has failed is alive, and waits
in JAX's shutdown for the others, which wait in a collective for it: minutes pass, and the reason is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

from llama_jax.console.exit_status import report_error, report_exception
from llama_jax.errors import ExitStatus, LlamaJaxError

from .coordination import ENDED, Agreement, KeyValueStore, process
from .watchdog import Watchdog

_POLL_SECONDS = 0.5
_NOTICE_SECONDS = 5.0  # in which the others have noticed a failure
_CLOSE_SECONDS = 30.0  # for a checkpoint of an earlier step, still being written


@contextlib.contextmanager
def end_together(close: Callable[[], None], agreement: Agreement, watchdog: Watchdog) -> Iterator[None]:
    """An error or a hang in the block ends all processes of the run within seconds; of a single one, a hang.

    The process that failed prints its error and exits, without the shutdown that would wait for the others.
    Each of the others prints that error, with the number of the process, and exits with the same status.

    Args:
      close: called first after an error, to complete what can be; it is left after 30 s.
      agreement: of this run; its background work is done in the thread that looks for failures.
      watchdog: watches the block.
    """
    if not jax.distributed.is_initialized():
        watchdog.start()
        try:
            yield
        finally:
            watchdog.stop()
        return
    peers = _Peers(agreement, watchdog)
    peers.start()
    watchdog.start(lambda reason: peers.exit(ExitStatus.HUNG, reason, reason))
    try:
        yield
    except BaseException as error:
        peers.stop()
        watchdog.stop()
        if not isinstance(error, LlamaJaxError):
            peers.end_like_another()  # a collective fails too if its peer has
        closing = threading.Thread(target=_quietly, args=(close,), daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        status = report_exception(error)
        if status is None:
            status = crash_status(error) or 1
            traceback.print_exc()
        peers.exit(status, " ".join(str(error).split()) or type(error).__name__)
    peers.stop()
    watchdog.stop()
    peers.tell(0)


# Status codes with which the runtime begins an error of a device or a connection; those that it gives a
# program, such as RESOURCE_EXHAUSTED and INVALID_ARGUMENT, would come again.
_LOST = (
    "UNKNOWN:",
    "INTERNAL:",
    "UNAVAILABLE:",
    "ABORTED:",
    "CANCELLED:",
    "DEADLINE_EXCEEDED:",
    "DATA_LOSS:",
)


def crash_status(error: BaseException) -> int | None:
    """`ExitStatus.LOST` for an error of a device, or of a collective whose peer has gone; None for any other.

    JAX raises the runtime's errors as a `JaxRuntimeError`, and from some calls as a `ValueError`.
    """
    if isinstance(error, RuntimeError | ValueError) and str(error).startswith(_LOST):
        return ExitStatus.LOST
    return None


class _Peers:
    """The processes of a run, by the coordination service's key-value store."""

    def __init__(self, agreement: Agreement, watchdog: Watchdog) -> None:
        self._agreement, self._watchdog = agreement, watchdog
        self._store = KeyValueStore()
        self._index, self._count = process()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begins to look for others that failed, in a thread: this one may wait in a collective."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, which must not be in JAX's client when that shuts down."""
        self._stopped.set()
        self._agreement.wake.set()
        self._thread.join()

    def tell(self, status: int, error: str = "") -> None:
        """Publishes how this process ends."""
        self._store.set(f"{ENDED}{self._index}", json.dumps({"status": status, "error": error[:2000]}))

    def end_like_another(self) -> None:
        """Ends this process if another has failed, or does so soon."""
        end = time.monotonic() + 4 * _POLL_SECONDS
        while time.monotonic() < end:
            self._end_if_failed()
            time.sleep(_POLL_SECONDS / 4)

    def exit(self, status: int, error: str = "", line: str = "") -> NoReturn:
        """Ends this process when the others have noticed; process 0, which hosts the service, as the last.

        JAX aborts a process that has lost the service.

        Args:
          status: the exit status.
          error: why this process failed, for the others.
          line: printed last, as the main thread may still print.
        """
        self.tell(status, error)
        end = time.monotonic() + _NOTICE_SECONDS
        while (error or self._index == 0) and len(self._ended()) < self._count and time.monotonic() < end:
            time.sleep(_POLL_SECONDS / 4)
        if self._index == 0:
            time.sleep(2 * _POLL_SECONDS)
        if line:
            report_error(line)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)

    def _ended(self) -> dict[str, dict[str, Any]]:
        return {name: json.loads(value) for name, value in self._store.read(ENDED).items()}

    def _end_if_failed(self) -> None:
        for name, ended in self._ended().items():
            if ended["error"]:
                if ended["status"] == ExitStatus.HUNG:
                    self._watchdog.dump(ended["error"])
                line = f"process {name} failed, and so this one stops: {ended['error']}"
                self.exit(ended["status"], line=line)

    def _watch(self) -> None:
        while self._goes_on():
            self._agreement.exchange(self._goes_on)
            self._agreement.wake.wait(_POLL_SECONDS)

    def _goes_on(self) -> bool:
        """Whether neither this process is about to end, nor another has failed."""
        if not self._stopped.is_set():
            self._end_if_failed()
        return not self._stopped.is_set()


def _quietly(close: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        close()
