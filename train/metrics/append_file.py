"""A file that records are appended to, each as a whole or not at all; in a store, an `ObjectLog`."""

from __future__ import annotations

import os
from pathlib import Path

from llama_jax.errors import InputError
from llama_jax.storage import StorePath

from .object_log import ObjectLog


class AppendFile:
    """Opened when the first record is written, and created then; never buffered.

    Args:
      path: the file; its directory is created too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._object = ObjectLog(path) if isinstance(path, StorePath) else None

    def append(self, record: bytes) -> None:
        """Writes a record; if only a part of it fits on the disk, that part is removed again.

        Raises:
          InputError: naming the file and the operating system's reason.
          StoreError: if an earlier record could not be written to a store.
        """
        if self._object is not None:
            self._object.append(record)
            return
        try:
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            end = os.fstat(self._descriptor).st_size
            try:
                written = 0
                while written < len(record):  # a full disk shortens a write, and fails only the next
                    written += os.write(self._descriptor, record[written:])
            except OSError:
                if written:
                    os.ftruncate(self._descriptor, end)
                raise
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise InputError(f"{self.path}: cannot be written: {reason}") from None

    def flush(self) -> None:
        """Writes what an object store has not got yet.

        Raises:
          StoreError: if that fails.
        """
        if self._object is not None:
            self._object.flush()

    def close(self) -> None:
        """Closes the file; records are on their way to the disk already."""
        if self._object is not None:
            self._object.close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
