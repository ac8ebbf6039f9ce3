"""Files of a run's directory that are there whole or not at all."""

from __future__ import annotations

from pathlib import Path

from llama_jax.errors import InputError


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file beside its place, and puts it there by one rename.

    Raises:
      InputError: if it cannot be written.
    """
    try:
        partial = path.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror}; make room, or choose another"
        ) from None
