"""A staging directory beside the output path, renamed to it when the output is complete.

An object store has no renaming, nor writing in any order: its staging directory is on the disk, and uploaded.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import CheckpointError, StoreError
from llama_jax.storage import StorePath, local_file, upload
from llama_jax.storage.cache import cache_folder
from llama_jax.weights.source import os_error_reason

SUFFIX = ".partial"
JOURNAL = "journal.jsonl"
_DATA, _LOCK = "data", "lock"
_LAST = ("_METADATA", "params.json", "config.json")  # uploaded after all else: what tells a format


@contextlib.contextmanager
def staged(target: Path, single_file: str | None = None) -> Iterator[Path]:
    """Context manager for a directory that is renamed to `target` if the block ends without an error.

    After an error, or if the process is killed, `target` does not exist, and the files are kept in
    `<target>.partial` for the next attempt; of a target in an object store in the cache.

    Args:
      target: the output path, which must not exist.
      single_file: the output is this file of the directory, not the directory.

    Yields:
      `<target>.partial/data`, with the files of an earlier attempt, if any.

    Raises:
      CheckpointError: if `target` exists, `<target>.partial` is not a staging directory, another process is
        writing it, or on a file system error.
    """
    partial = _staging_folder(target)
    data, complete = partial / _DATA, False
    with _locked(partial, target):
        try:
            yield data
            if isinstance(target, StorePath):
                _check_absent(target)
                upload(data / (single_file or ""), target, last=_LAST)
                complete = True
                return
            for path in sorted(data.rglob("*")):
                sync_path(path)
            sync_path(data)
            _check_absent(target)
            (data / (single_file or "")).rename(target)
            sync_path(target.parent)
        except OSError as error:
            raise CheckpointError(
                f"{target}: cannot be written: {os_error_reason(error)}; partial output is kept in {partial};"
                " run the same command to resume"
            ) from error
        except StoreError as error:
            raise StoreError(
                f"{error}; what was written is kept in {partial}: run the same command to resume",
                transient=error.transient,
            ) from error
        finally:
            complete = complete or (local_file(target) and target.exists())
            if complete or not any(path.is_file() for path in data.rglob("*")):
                _remove(partial)


@contextlib.contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    """Creates the staging directory if needed, and locks it against other processes during the block."""
    try:
        _check_absent(target)
        _check_staging(partial)
        (partial / _DATA).mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.fdopen(os.open(partial / _LOCK, flags, 0o644), "r+")  # closed below
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written: {os_error_reason(error)}; write elsewhere"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            acquired = os.path.samestat(os.fstat(lock.fileno()), (partial / _LOCK).stat())
        except OSError:  # locked, or removed by a process that has just finished
            acquired = False
        _check_absent(target)
        if not acquired:
            raise CheckpointError(f"{target}: another process is writing it; wait for that process")
        yield


def _staging_folder(target: Path) -> Path:
    """Returns the staging directory of an output: beside it, or in the cache if it is in an object store."""
    if not isinstance(target, StorePath):
        return target.with_name(target.name + SUFFIX)
    key = hashlib.sha256(str(target).encode()).hexdigest()[:16]
    return cache_folder() / "uploads" / f"{target.name}-{key}{SUFFIX}"


def _check_absent(target: Path) -> None:
    if _exists(target):
        raise CheckpointError(f"{target}: already exists; remove it, or give another path to write to")


def _exists(target: Path) -> bool:
    """Whether an output exists; what an interrupted upload has left of this one in a store does not count."""
    if not isinstance(target, StorePath):
        return os.path.lexists(target)
    if _staging_folder(target).exists():
        return target.is_file() or any((target / name).is_file() for name in _LAST)
    return target.exists()


def _check_staging(partial: Path) -> None:
    """Rejects a path that is not a staging directory, because that is removed in the end."""
    if not os.path.lexists(partial):
        return
    found = list(partial.iterdir()) if partial.is_dir() and not partial.is_symlink() else [partial]
    names = {path.name for path in found}
    # What is in them is removed or overwritten, so they must not lead elsewhere.
    real = all((path.is_dir() if path.name == _DATA else path.is_file()) for path in found)
    real = real and not any(path.is_symlink() for path in found)
    if names and not (real and _LOCK in names and names <= {_DATA, _LOCK, JOURNAL}):
        raise CheckpointError(f"{partial}: is in the way; move it, or give another path to write to")


def _remove(partial: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(partial / _DATA, ignore_errors=True)
        for name in (JOURNAL, _LOCK):
            (partial / name).unlink(missing_ok=True)
        partial.rmdir()


def sync_path(path: Path) -> None:
    """Flushes a file, or a directory's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
