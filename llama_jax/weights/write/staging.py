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
JOURNAL = "journal.jsonl"
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
      CheckpointError: if something is at `target` or in the way beside it, another process is writing it, or
        the file system refuses.
    """
    partial = target.with_name(target.name + SUFFIX)
    data = partial / _DATA
    with _claimed(partial, target):
        try:
            yield data
            for path in sorted(data.rglob("*")):
                sync_path(path)
            sync_path(data)
            _refuse_existing(target)
            (data / (single_file or "")).rename(target)
            sync_path(target.parent)
        except OSError as error:
            raise CheckpointError(
                f"{target}: cannot be written: {reason(error)}; what is done is kept in {partial}, and the "
                "same command goes on from there"
            ) from error
        finally:
            if target.exists() or not any(path.is_file() for path in data.rglob("*")):
                _remove(partial)


@contextlib.contextmanager
def _claimed(partial: Path, target: Path) -> Iterator[None]:
    """Makes the place, if it is not there, and keeps other processes out of it during the block."""
    try:
        _refuse_existing(target)
        _refuse_strange(partial)
        (partial / _DATA).mkdir(parents=True, exist_ok=True)
        lock = (partial / _LOCK).open("w")  # closed below
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {reason(error)}; write elsewhere") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(lock.fileno()), (partial / _LOCK).stat())
        except OSError:  # locked, or removed by the process that has just finished
            ours = False
        _refuse_existing(target)
        if not ours:
            raise CheckpointError(f"{target}: another process is writing it; wait for that one")
        yield


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target}: is there already; remove it, or give another path to write to")


def _refuse_strange(partial: Path) -> None:
    """Refuses a place that holds what no attempt of ours has left: it would be removed in the end."""
    if not os.path.lexists(partial):
        return
    ours = partial.is_dir() and not partial.is_symlink()
    names = {path.name for path in partial.iterdir()} if ours else {""}
    if names and not (_LOCK in names and names <= {_DATA, _LOCK, JOURNAL}):
        raise CheckpointError(f"{partial}: is in the way; move it, or give another path to write to")


def _remove(partial: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(partial / _DATA, ignore_errors=True)
        for name in (JOURNAL, _LOCK):
            (partial / name).unlink(missing_ok=True)
        partial.rmdir()


def sync_path(path: Path) -> None:
    """Waits until the disk has a file's bytes, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
