"""Atomic file writes: a file is either complete or absent."""

from __future__ import annotations

from pathlib import Path

from llama_jax.errors import InputError
from llama_jax.storage import local_file


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a temporary file in the same directory, then renames it to `path`.

    Raises:
      InputError: if it cannot be written.
    """
    try:
        if not local_file(path):  # an object appears whole
            path.write_bytes(content)
            return
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}; free some space, or choose another directory"
        ) from None
