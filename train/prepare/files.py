"""Files that are either complete or absent, and errors of the disk in one line."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import DataError, LlamaJaxError


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, whose file is renamed to `path` if the block succeeds.

    Of several processes that write the same file, each has a temporary one of its own.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        with partial.open("rb") as opened:
            os.fsync(opened.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Converts errors of writing below `out` to `DataError`s."""
    try:
        yield
    except LlamaJaxError:
        raise
    except OSError as error:
        why = error.strerror or " ".join(str(error).split())[:120]
        raise DataError(
            f"cannot write {error.filename or out} ({why}); free some space or use another OUT, and run the "
            "same command again: it goes on where it stopped"
        ) from None


def file_digest(path: Path) -> str:
    """Returns the BLAKE2b hash of a file, 16 bytes in hexadecimal."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
