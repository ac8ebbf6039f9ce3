"""The cache of converted files: one copy of each, shared by processes and runs, bounded on disk.

Readers index files and read records in any order, which compressed data does not allow: a decompressed copy
is written once, by whoever has locked the file that becomes it. The alternative, restart points in the
compressed file, does not exist within a zstd frame, and with gzip costs the decompression of megabytes for
each record. A copy gets its final name when it is complete and on disk. Each process lists the copies that it
uses in a file of its own, which is locked while it lives: one descriptor, however many files a corpus has.
Copies that no process uses are removed, oldest first, when the disk is nearly full, or after a month.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from llama_jax.console import terminal
from llama_jax.errors import DataError
from llama_jax.storage import is_address
from llama_jax.storage.cache import cache_folder

from .files import Copy, File, read_chunks, sampled_digest

_VERSION = 1  # of the conversions
_MAX_RATIO = 250  # a copy may have this many times the original's size
_ALWAYS_BYTES = 256 << 20  # or this size
_RESERVE_BYTES = 1 << 30  # free space to leave on the disk, at most a twentieth of it
_CHECK_BYTES = 64 << 20
_CHUNK_BYTES = 8 << 20
_UNUSED_SECONDS = 30 * 24 * 3600
_SUFFIX, _PARTIAL, _USER = ".copy", ".part", ".user"
_claimed: dict[Path, tuple[int, set[str]]] = {}  # of each cache: this process's list, and what it holds
_claiming = threading.Lock()

Write = Callable[["Sink"], None]


def converted(file: File, kind: str, write: Write) -> File:
    """Returns the file with a converted copy, written first if it is not in the cache.

    Args:
      file: the file; its content may itself be a copy.
      kind: names the conversion.
      write: writes the converted content of the file.

    Raises:
      DataError: if the file cannot be converted, the copy would be too large, or it cannot be written.
    """
    origin = file.copy.key if file.copy else f"{file.mtime_ns} {sampled_digest(file).hex()}"
    key = hashlib.blake2b(f"{_VERSION} {kind} {origin}".encode(), digest_size=16).hexdigest()

    def write_converted(opened: BinaryIO) -> None:
        write(Sink(opened, file, _path(key).parent))

    note = f"converting {file.path}" if file.nbytes > _CHECK_BYTES else ""
    path = keep(key, f"a copy of {file.path} ({kind})", write_converted, note=note)
    return dataclasses.replace(file, copy=Copy(str(path), path.stat().st_size, key))


def keep(
    key: str,
    what: str,
    write: Callable[[BinaryIO], None],
    *,
    is_whole: Callable[[int], bool] = lambda size: True,
    note: str = "",
) -> Path:
    """Returns the path of a file in the cache, which is written first if it is not there.

    Args:
      key: identifies its content.
      what: names it in messages.
      write: writes it.
      is_whole: whether a file of this size may be whole; it is written again if not.
      note: a note to print before it is written.

    Raises:
      DataError: if it cannot be written.
    """
    path = _path(key)
    try:
        size = _use(path)
        if size is not None and not is_whole(size):
            path.unlink(missing_ok=True)
            size = None
        if size is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _removing(path.parent, wait=False) as locked:
                if locked:
                    _remove_unused(path.parent)
            _write(path, write, note)
        return path
    except OSError as error:
        if error.errno is None:
            raise  # not of the disk
        raise DataError(
            f"{path}, {what}, cannot be written ({error.strerror or error}); free some space, or set "
            "LLAMA_JAX_CACHE to a writable directory"
        ) from None


def find_copy(key: str) -> Copy | None:
    """Returns the copy of this key, if the cache has it, and lists it as used until this process ends."""
    path = _path(key)
    size = _use(path)
    return None if size is None else Copy(str(path), size, key)


def _path(key: str) -> Path:
    return cache_folder() / "data" / f"{key}{_SUFFIX}"


def on_disk(file: File) -> File:
    """Returns the file, an object of a store with a copy in the cache, for libraries that read files alone.

    Raises:
      DataError: as `converted`.
    """
    if not is_address(file.content):
        return file

    def write(sink: Sink) -> None:
        with file.open() as opened:
            for chunk in read_chunks(opened, _CHUNK_BYTES):
                sink.write(chunk)

    return converted(file, "object", write)


class Sink:
    """A file to write to, that refuses to grow without bound; for pyarrow too.

    Attributes:
      closed: False.
    """

    closed = False

    def __init__(self, file: BinaryIO, original: File, folder: Path):
        self._file = file
        self._original = original
        self._folder = folder
        self._written = 0
        self._checked = 0
        self._limit = max(_ALWAYS_BYTES, _MAX_RATIO * original.nbytes)

    def write(self, data: bytes) -> int:
        """Writes all of `data`.

        Raises:
          DataError: if the copy is too large, or would fill the disk.
        """
        self._written += len(data)
        if self._written > self._limit:
            raise DataError(
                f"{self._original.path} has {self._original.nbytes} bytes and expands to more than "
                f"{self._limit}; if that is right, decompress it yourself"
            )
        if self._written >= self._checked:
            self._checked = self._written + _CHECK_BYTES
            self._leave_space()
        return self._file.write(data)

    def flush(self) -> None:
        """Does nothing: the file is flushed when it is complete."""

    def close(self) -> None:
        """Does nothing: the file belongs to the cache."""

    def _leave_space(self) -> None:
        disk = shutil.disk_usage(self._folder)
        if disk.free < _reserve(disk.total):
            with _removing(self._folder, wait=True):
                _remove_unused(self._folder, until_free=_reserve(disk.total))
            if shutil.disk_usage(self._folder).free < _reserve(disk.total):
                raise DataError(
                    f"{self._original.path} is converted into {self._folder}, whose disk is nearly full; "
                    "free some space, or set LLAMA_JAX_CACHE to a directory on a larger disk"
                )


def _reserve(total: int) -> int:
    return min(_RESERVE_BYTES, total // 20)


def _write(path: Path, write: Callable[[BinaryIO], None], note: str) -> None:
    """Writes a copy, or waits for the process that does."""
    with _partial(path) as (partial, opened):
        if _use(path) is not None:  # another process has written it meanwhile
            return
        if note:
            terminal.note(f"{note} once, into {path.parent}")
        try:
            opened.truncate(0)
            write(opened)
            opened.flush()
            os.fsync(opened.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    _use(path)


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Opens the file that becomes the copy `path`, which the process that writes it locks.

    Where the file system has no locks each process has one of its own, and the last to finish wins.
    """
    while True:
        partial = path.with_suffix(_PARTIAL)
        with partial.open("ab") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX)
            except OSError:
                partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}{_PARTIAL}")
            else:
                if not _is(partial, opened) and _use(path) is None:
                    continue  # it was removed, when whoever wrote it had failed
                yield partial, opened
                return
        with partial.open("wb") as opened:
            yield partial, opened
        return


def _is(path: Path, opened: BinaryIO) -> bool:
    try:
        return path.stat().st_ino == os.fstat(opened.fileno()).st_ino
    except FileNotFoundError:
        return False


def _use(path: Path) -> int | None:
    """Lists a copy as used until this process ends; returns its size, or None if it does not exist."""
    if not path.parent.is_dir():
        return None
    with contextlib.suppress(OSError):  # a cache that others have filled may be read-only
        _claim(path)
    try:
        with contextlib.suppress(PermissionError):
            os.utime(path)
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _claim(path: Path) -> None:
    with _claiming:
        _claim_locked(path)


def _claim_locked(path: Path) -> None:
    if path.parent not in _claimed:
        name = path.with_name(f"{os.getpid()}-{os.urandom(8).hex()}{_USER}")
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        _claimed[path.parent] = descriptor, set()
    descriptor, names = _claimed[path.parent]
    if path.name not in names:
        names.add(path.name)
        os.write(descriptor, f"{path.name}\n".encode())


def _used(folder: Path) -> set[str]:
    """The copies that living processes list; the lists of others are removed."""
    names: set[str] = set()
    for path in folder.glob(f"*{_USER}"):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                names |= {*opened.read().decode().split()}
            else:
                path.unlink()
    return names


def _remove_unused(folder: Path, until_free: int | None = None) -> None:
    """Removes what killed processes left, and the copies that nobody used for long.

    With `until_free` the oldest ones that no process uses instead, until so many bytes are free. The folder
    is locked by the caller: nobody else removes.
    """
    copies = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            if path.suffix == _SUFFIX:
                copies.append((path.stat().st_mtime, path))
            elif path.suffix == _PARTIAL and until_free is None:
                with path.open("rb") as opened:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody writes it
                    path.unlink()
    in_use = _used(folder)
    for used, path in sorted(copies):
        if until_free is None and time.time() - used < _UNUSED_SECONDS:
            return
        if until_free is not None and shutil.disk_usage(folder).free >= until_free:
            return
        if path.name in in_use:
            continue
        with contextlib.suppress(OSError):
            aside = path.rename(path.with_suffix(_PARTIAL))
            if path.name in _used(folder):  # listed meanwhile
                aside.rename(path)
            else:
                aside.unlink()


@contextlib.contextmanager
def _removing(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Locks the folder for removing, with a lock that the system releases if the process is killed.

    Yields:
      Whether the lock is held; some network file systems have none.
    """
    with (folder / "lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
