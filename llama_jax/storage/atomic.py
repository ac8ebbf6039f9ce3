"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import InputError
from llama_jax.storage.address import local_file


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, whose file is renamed to `path` if the block succeeds.

    Of several processes that write the same file, each has a temporary one of its own. The folder is created.
    An object of a store appears whole anyway: of one, the path itself is yielded.
    """
    if not local_file(path):
        yield path
        return
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        with partial.open("rb") as opened:
            os.fsync(opened.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file or an object; text as UTF-8.

    Raises:
      InputError: if it cannot be written; what was there is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        with atomic_file(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written: {error.strerror or error}; free some space, or choose another "
            "directory"
        ) from None
