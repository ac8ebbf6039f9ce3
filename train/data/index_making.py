"""Makes the index of text or JSON files, with all processes that want it.

Each takes a unit of work that no other has locked, and writes what it found in a part of its own. A killed
process loses the units it was at, and its locks with it. When all parts are there, one process joins them.
Doing a unit twice is harmless: nobody waits long for a process that seems to be stuck, and a file system
without locks costs no more than some work done twice.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llama_jax.console import terminal
from llama_jax.errors import DataError

from .compression import Plain
from .files import File
from .index import Index, IndexWriter
from .index_parts import Range, ScannedRange, Unit, joined, read_part, write_part
from .pieces import BLOCK_BYTES, Kind, can_split

UNIT_BYTES = 32 * BLOCK_BYTES
FILE_BYTES = 1 << 16  # what opening a file costs, in bytes scanned
_POLL_SECONDS = 0.2
_STUCK_SECONDS = 60.0  # without progress of the others, after which their units are done again
_MAX_THREADS = 16
_PART = ".part"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

Find = Callable[[Path, Sequence[File]], tuple[Index | None, str]]


def join(files: Sequence[File], ranges: Iterable[ScannedRange], out: BinaryIO, folder: Path | None) -> None:
    """Writes the index; `ranges` are in the order of the files, and its temporary files go to `folder`."""
    writer = IndexWriter(out, folder)
    for number, group in itertools.groupby(ranges, key=lambda found: found.facts["file"]):
        of_file = list(group)
        digest = hashlib.blake2b(digest_size=16)
        for found in of_file:
            digest.update(found.digests)
        read, file = of_file[-1].facts["end"], files[number]
        digest.update(read.to_bytes(8, "little"))
        writer.add_file(
            joined(of_file),
            size=file.size,
            mtime_ns=file.mtime_ns,
            read=read,
            digest=digest.digest(),
            sample=bytes.fromhex(of_file[0].facts["sample"]) or bytes(16),
            copy=bytes.fromhex(of_file[0].facts["copy"]) or bytes(16),
        )
    writer.close()


class Making:
    """An index in the making: `build` has the parts, and `path` will be the index."""

    def __init__(self, files: Sequence[File], kind: Kind, plain: Plain, path: Path, build: Path, find: Find):
        """`find` returns the index at a path if it fits the files, or why it does not."""
        self._find = find
        self._files = files
        self._kind = kind
        self._plain = plain
        self._path = path
        self._build = build
        self._units = _units(files, kind, plain)
        self._sizes = [sum((r.end or files[r.file].size) - r.start for r in unit) for unit in self._units]
        self._done: set[int] = set()
        self._bytes = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._before = _inode(path)  # an index that does not fit

    def _appeared(self) -> bool:
        """Returns whether another process has completed the index."""
        return _inode(self._path) not in (None, self._before)

    def run(self) -> Index:
        """Makes the index, with whoever else does.

        Raises:
          DataError: as `indexing.open_index`.
        """
        fallback = f"indexing the data once, into {self._path}"
        try:
            index, _ = self._find(self._path, self._files)  # completed before this process made its folder
            if index is not None:
                self._remove_builds()
                return index
            with terminal.progress_bar("indexing", fallback=fallback) as update:
                self._do_units(lambda: update(self._progress(), sum(self._sizes), ""))
            with self._locked(self._build / "join", wait=True):
                index, _ = self._find(self._path, self._files)
                if index is None:
                    self._join_parts()
                    index, problem = self._find(self._path, self._files)
                    if index is None:
                        raise DataError(f"{problem}; run the command again")
                self._remove_builds()
                return index
        except OSError as error:
            raise DataError(
                f"{self._path}, the index of the data, cannot be written ({error.strerror or error}); free "
                "some space, or set LLAMA_JAX_CACHE to a writable directory"
            ) from None

    def _progress(self) -> int:
        with self._lock:
            return min(self._bytes, sum(self._sizes))

    def _do_units(self, show: Callable[[], None]) -> None:
        order = list(range(len(self._units)))
        first = random.randrange(len(order))  # each process begins elsewhere
        queue = iter(order[first:] + order[:first])
        threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), len(order))
        with (
            concurrent.futures.ThreadPoolExecutor(threads) as hashing,
            concurrent.futures.ThreadPoolExecutor(threads) as pool,
        ):
            workers = [
                pool.submit(self._work, queue, hashing if threads > len(order) else None)
                for _ in range(threads)
            ]
            try:
                self._wait(workers, show)
            except BaseException:
                self._stop.set()
                raise
            last, moved = self._unfinished(), time.monotonic()
            while (left := self._unfinished()) and not self._appeared():
                if left != last:
                    last, moved = left, time.monotonic()
                stuck = time.monotonic() - moved > _STUCK_SECONDS
                for unit in sorted(left):
                    self._do(unit, hashing, wait_for_lock=not stuck)
                    show()
                if self._unfinished() == left:
                    time.sleep(_POLL_SECONDS)
            show()

    def _wait(self, workers: Sequence[concurrent.futures.Future[None]], show: Callable[[], None]) -> None:
        left = set(workers)
        while left:
            done, left = concurrent.futures.wait(left, _POLL_SECONDS, concurrent.futures.FIRST_EXCEPTION)
            for worker in done:
                worker.result()
            show()

    def _work(self, queue: Iterator[int], hashing: concurrent.futures.Executor | None) -> None:
        while not self._stop.is_set():
            with self._lock:
                unit = next(queue, None)
            if unit is None or self._appeared():
                return
            self._do(unit, hashing)

    def _part(self, unit: int) -> Path:
        return self._build / f"{unit:06}{_PART}"

    def _unfinished(self) -> set[int]:
        for unit in set(range(len(self._units))) - self._done:
            if self._part(unit).exists():
                self._finish(unit, self._sizes[unit])
        return set(range(len(self._units))) - self._done

    def _finish(self, unit: int, progress: int) -> None:
        with self._lock:
            if unit not in self._done:
                self._done.add(unit)
                self._bytes += progress

    def _do(
        self, unit: int, hashing: concurrent.futures.Executor | None, *, wait_for_lock: bool = True
    ) -> None:
        """Does a unit, unless it is done, or another process is at it."""
        path = self._part(unit)
        if path.exists():
            self._finish(unit, self._sizes[unit])
            return
        with self._locked(path.with_suffix(".lock"), wait=False) as locked:
            if (wait_for_lock and not locked) or path.exists():
                return
            partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")

            def progress(size: int) -> None:
                if self._stop.is_set():
                    raise DataError("stopped")
                with self._lock:
                    self._bytes += size

            try:
                with partial.open("wb", 1 << 20) as out:
                    write_part(
                        out,
                        self._units[unit],
                        self._files,
                        self._kind,
                        plain=self._plain,
                        progress=progress,
                        hashing=hashing,
                    )
                    out.flush()
                    os.fsync(out.fileno())
                partial.replace(path)
            except FileNotFoundError:
                if self._build.exists():
                    raise
                return  # another process has joined the parts meanwhile
            finally:
                partial.unlink(missing_ok=True)
            self._finish(unit, 0)

    @contextlib.contextmanager
    def _locked(self, path: Path, *, wait: bool) -> Iterator[bool]:
        """Acquires a lock, which the system releases if the process is killed.

        Yields:
          Whether it is held; True on a file system without locks.
        """
        try:
            opened = path.open("ab")
        except FileNotFoundError:  # the folder is removed when the index is complete
            yield True
            return
        with opened:
            deadline = time.monotonic() + (_STUCK_SECONDS if wait else 0)
            while True:
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno not in _NO_LOCKS:
                        if time.monotonic() < deadline and not self._appeared():
                            time.sleep(_POLL_SECONDS)
                            continue
                        yield False
                        return
                yield True
                return

    def _join_parts(self) -> None:
        partial = self._build / f"joined.{os.getpid()}"

        def ranges() -> Iterator[ScannedRange]:
            for unit in range(len(self._units)):
                path = self._part(unit)
                try:
                    yield from read_part(np.memmap(path, np.uint8, "r"))
                except ValueError:
                    path.unlink(missing_ok=True)
                    raise DataError(f"{path} is damaged, and removed; run the command again") from None

        try:
            with partial.open("wb") as out:
                join(self._files, ranges(), out, self._path.parent)
                out.flush()
                os.fsync(out.fileno())
            for file in self._files:
                file.check()
            partial.replace(self._path)
        finally:
            partial.unlink(missing_ok=True)

    def _remove_builds(self) -> None:
        """Removes the parts, and those of earlier states of the files."""
        for build in self._path.parent.glob(f"{self._path.stem}.*"):
            if build.is_dir():
                shutil.rmtree(build, ignore_errors=True)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _units(files: Sequence[File], kind: Kind, plain: Plain) -> list[Unit]:
    """Divides the files into units of work: ranges of large ones, and groups of small ones."""
    units: list[Unit] = []
    group: list[Range] = []
    size = 0
    for i, file in enumerate(files):
        if file.size > UNIT_BYTES and can_split(file, kind) and not plain.changes(file):
            units.append(tuple(group))
            group, size = [], 0
            starts = range(0, file.size, UNIT_BYTES)
            units += [(Range(i, start, min(start + UNIT_BYTES, file.size)),) for start in starts]
            continue
        group.append(Range(i))
        size += max(file.size, FILE_BYTES)
        if size >= UNIT_BYTES:
            units.append(tuple(group))
            group, size = [], 0
    return [unit for unit in [*units, tuple(group)] if unit]
