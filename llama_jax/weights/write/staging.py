"""A place beside an output's path to write in, which becomes the output when it is whole."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import CheckpointError
from llama_jax.weights.source import reason

SUFFIX = ".partial"
_DATA, _LOCK = "data", "lock"


@contextlib.contextmanager
def staged(target: Path, single_file: str | None = None) -> Iterator[Path]:
    """Gives a directory to write in; what is in it becomes `target` if the block ends without an error.

    After an error, or the death of the process, `target` is not there, and what was written is kept in
    `<target>.partial` for the next attempt.

    Args:
      target: where the output will be; nothing may be there.
      single_file: the output is this file of the directory, not the directory.

    Yields:
      `<target>.partial/data`, with whatever an earlier attempt has left in it.

    Raises:
      CheckpointError: if something is at `target`, another process is writing it, or the file system
        refuses.
    """
    partial = target.with_name(target.name + SUFFIX)
    try:
        if os.path.lexists(target):
            raise CheckpointError(f"{target}: is there already; remove it, or give another path to write to")
        (partial / _DATA).mkdir(parents=True, exist_ok=True)
        with _locked(partial / _LOCK, target):
            yield partial / _DATA
            for path in sorted((partial / _DATA).rglob("*")):
                sync_path(path)
            sync_path(partial / _DATA)
            if os.path.lexists(target):
                raise CheckpointError(f"{target}: appeared while it was written; {partial / _DATA} has ours")
            (partial / _DATA / (single_file or "")).rename(target)
            sync_path(target.parent)
            shutil.rmtree(partial)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written: {reason(error)}; what is done is kept in {partial}, and the same "
            "command goes on from there"
        ) from error


@contextlib.contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{target}: another process is writing it; wait for that one") from None
        yield


def sync_path(path: Path) -> None:
    """Waits until the disk has a file's bytes, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
