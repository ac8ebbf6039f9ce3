"""A log in an object store: objects cannot be appended to, so a log is written again as a whole.

That is every few seconds, less often the longer it is, in a thread; and whenever a checkpoint is saved, so
that a run that is killed has the records up to the step that it resumes after. A reader finds one object.
"""

from __future__ import annotations

import sys
import threading

from llama_jax.errors import StoreError
from llama_jax.storage import StorePath

_SECONDS = 10.0  # between two writes, and
_BYTES_PER_SECOND = 1 << 20  # for each byte of the log


class ObjectLog:
    """Collects records, and writes them with those that were there.

    Args:
      path: the object.
    """

    def __init__(self, path: StorePath) -> None:
        self.path = path
        self._content: bytearray | None = None
        self._written = -1  # bytes in the store
        self._problem: StoreError | None = None
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def append(self, record: bytes) -> None:
        """Adds a record, which is written within some seconds.

        Raises:
          StoreError: if an earlier one could not be written.
        """
        if self._content is None:
            try:
                self._content = bytearray(self.path.read_bytes())
                self._written = len(self._content)
            except FileNotFoundError:
                self._content = bytearray()
            self._thread.start()
        self._content += record
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def flush(self) -> None:
        """Writes the records that have not been written.

        Raises:
          StoreError: if they cannot be.
        """
        with self._lock:
            if self._content is not None and len(self._content) != self._written:
                content = bytes(self._content)
                self.path.write_bytes(content)
                self._written = len(content)

    def _run(self) -> None:
        while not self._stop.wait(max(_SECONDS, self._written / _BYTES_PER_SECOND)):
            try:
                self.flush()
            except StoreError as error:
                self._problem = error

    def close(self) -> None:
        """Writes what is left.

        Raises:
          StoreError: if it cannot be, unless another error is being handled: that one is to be said.
        """
        failing = sys.exception() is not None
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self.flush()
        except StoreError:
            if not failing:
                raise
