"""Writing a file that a user asked for: whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from llama_jax.errors import InputError


def check_writable(path: str | Path) -> None:
    """Checks before long work that its result can be written.

    Raises:
      InputError: if the folder is missing or refuses, or the path is a folder.
    """
    target = Path(path).absolute()
    if target.is_dir():
        raise InputError(f"{path}: is a folder; give a file")
    if not target.parent.is_dir():
        raise InputError(f"{path}: there is no folder {target.parent}; create it, or give another path")
    if not os.access(target.parent, os.W_OK):
        raise InputError(f"{path}: the folder {target.parent} cannot be written to; give another path")


def write_whole(path: str | Path, text: str) -> None:
    """Writes a text file by renaming a temporary one beside it.

    Raises:
      InputError: if it cannot be written; a file that was there is as it was.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
