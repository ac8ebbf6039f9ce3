"""Sizes of the files in a folder that another process is changing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def file_sizes(folder: Path, suffix: str = "") -> Iterator[int]:
    """Bytes of each file below a local folder whose name ends with `suffix`.

    What is removed meanwhile is left out. (`Path.rglob` raises FileNotFoundError if a folder is removed
    between its listing and its reading; `os.walk` passes over it.)
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(suffix):
                with contextlib.suppress(OSError):
                    yield Path(parent, name).stat().st_size
