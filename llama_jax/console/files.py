"""Whether a file that a user asked for can be written, asked before long work."""

from __future__ import annotations

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
