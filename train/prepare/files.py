"""Small files, errors of the disk in one line, and digests."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import DataError, LlamaJaxError
from llama_jax.storage.atomic import atomic_file


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically; raises OSError, which `disk_errors` converts."""
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
