"""Carries out a plan: reads tensors, encodes them and writes them in their places, several at a time.

A journal says which regions are written, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.errors import CheckpointError
from llama_jax.weights.names import Leaf
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.journal import Journal
from llama_jax.weights.write.plan import Plan, Region, Store
from llama_jax.weights.write.staging import JOURNAL, staged

Progress = Callable[[int, int, str], None]

_VERSION = 1  # of what the encoders write: another one does not go on with it
_THREADS = 2  # one waits for the disk while the other computes
_IN_FLIGHT = 512 << 20  # bytes of tensors held at a time; a larger one goes alone
_SYNC_EVERY = 256 << 20  # bytes written between two entries in the journal


def write(
    plan: Plan, tensors: Tensors, target: Path, *, origin: str | None = None, progress: Progress | None = None
) -> None:
    """Writes an output, which appears at its path when it is whole.

    Host memory holds 512 MB of tensors, or the largest of them if that is more.

    Args:
      plan: what goes where.
      tensors: what `plan.regions` read.
      target: the output's path; nothing may be there.
      origin: says what `tensors` are, so that what an earlier run left of the same is gone on with; None
        always begins anew.
      progress: called with bytes written, bytes in all, and what was written.

    Raises:
      CheckpointError: if something is at `target`, a tensor cannot be read or encoded, or the disk is full.
    """
    name = next(iter(plan.files)) if plan.single_file else None
    with staged(target, name) as folder:
        goes_on = origin is not None and _is_as_left(plan, folder)
        job = _fingerprint(plan, origin or "")
        journal = Journal(folder.parent / JOURNAL, job, len(plan.regions), goes_on=goes_on)
        if not journal.done:
            _clear(folder)
        _check_space(plan, folder, target)
        opened = _Files.open(plan, folder) if plan.store is None else plan.store(folder)
        with opened as store:
            checksums = _Writer(plan, tensors, store, journal, progress).run()
            if isinstance(store, _Files):
                for piece in itertools.chain(plan.pieces, plan.finish(checksums) if plan.finish else ()):
                    store.put(piece.file, memoryview(piece.data), piece.offset)
        for file, data in plan.extras.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)


class _Job(NamedTuple):
    """The regions of one tensor, by their numbers."""

    leaf: Leaf
    layer: int | None
    regions: Sequence[int]

    @property
    def name(self) -> str:
        return self.leaf.name("hf", self.layer)


class _Writer:
    """The regions of a plan while they are being written."""

    def __init__(
        self,
        plan: Plan,
        tensors: Tensors,
        store: Store,
        journal: Journal,
        progress: Progress | None,
    ) -> None:
        self.plan, self.tensors, self.store, self.journal = plan, tensors, store, journal
        self.progress = progress or (lambda *_: None)
        self.total = sum(region.nbytes for region in plan.regions)
        self.written = sum(plan.regions[index].nbytes for index in journal.done)
        self.stop = threading.Event()

    def run(self) -> list[int]:
        """Writes what the journal does not have yet; returns the CRC-32 of every region."""
        unsynced = 0
        self.progress(self.written, self.total, "")
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for job, checksums in self._results(pool):
                    nbytes = sum(self.plan.regions[index].nbytes for index in job.regions)
                    self.journal.add(checksums)
                    unsynced += nbytes
                    if unsynced >= _SYNC_EVERY:
                        self._sync()
                        unsynced = 0
                    self.written += nbytes
                    self.progress(self.written, self.total, job.name)
            finally:
                self.stop.set()
                self._sync()
        return [self.journal.done[index] for index in range(len(self.plan.regions))]

    def _results(self, pool: ThreadPoolExecutor) -> Iterator[tuple[_Job, dict[int, int]]]:
        """Runs the jobs as memory allows and yields what is done, in any order."""
        running: dict[Future[dict[int, int]], tuple[_Job, int]] = {}
        in_flight = 0
        for job in self._jobs():
            cost = self._cost(job)
            while running and (in_flight + cost > _IN_FLIGHT or len(running) > _THREADS):
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    finished, freed = running.pop(future)
                    in_flight -= freed
                    yield finished, future.result()
            running[pool.submit(self._write, job)] = job, cost
            in_flight += cost
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                finished, _ = running.pop(future)
                yield finished, future.result()

    def _jobs(self) -> Iterator[_Job]:
        left = [index for index in range(len(self.plan.regions)) if index not in self.journal.done]

        def tensor(index: int) -> tuple[tuple[str, ...], int]:
            region = self.plan.regions[index]
            return region.leaf.path, -1 if region.layer is None else region.layer

        if self.tensors.stacked:
            left.sort(key=tensor)

        for _, group in itertools.groupby(left, tensor):
            indices = list(group)
            region = self.plan.regions[indices[0]]
            yield _Job(region.leaf, region.layer, indices)

    def _cost(self, job: _Job) -> int:
        """About the bytes that a job holds at once: a tensor as read, reordered, and encoded."""
        size = int(np.prod(job.leaf.stored_shape(self.tensors.config, "hf")))
        read = size * self.tensors.dtype(job.leaf, job.layer).itemsize
        return 2 * read + max(self.plan.regions[index].nbytes for index in job.regions)

    def _write(self, job: _Job) -> dict[int, int]:
        if self.stop.is_set():
            return {}
        tensor, checksums = self.tensors.read(job.leaf, job.layer), {}
        for index in job.regions:
            region = self.plan.regions[index]
            part = tensor if region.rows is None else tensor[region.rows]
            try:
                data = np.ascontiguousarray(region.encode(part))
            except CheckpointError as error:
                raise CheckpointError(f"{job.name}: {error}") from error
            if data.nbytes != region.nbytes:
                raise AssertionError(f"{job.name}: planned {region.nbytes} bytes, encoded {data.nbytes}")
            self.store.write(region, data)
            checksums[index] = zlib.crc32(_bytes_of(data)) if self.plan.finish else 0
        return checksums

    def _sync(self) -> None:
        self.store.sync()
        self.journal.save()


class _Files:
    """A plan's data files, open for writing."""

    def __init__(self, files: dict[str, int]) -> None:
        self.files = files

    @classmethod
    @contextlib.contextmanager
    def open(cls, plan: Plan, folder: Path) -> Iterator[_Files]:
        with contextlib.ExitStack() as stack:
            opened = {file: _allocated(folder / file, size) for file, size in plan.files.items()}
            yield cls({file: stack.enter_context(descriptor) for file, descriptor in opened.items()})

    def write(self, region: Region, data: np.ndarray) -> None:
        self.put(region.file, _bytes_of(data), region.offset)

    def put(self, file: str, data: memoryview, offset: int) -> None:
        while data:  # one call writes 2 GB at most
            count = os.pwrite(self.files[file], data, offset)
            data, offset = data[count:], offset + count

    def sync(self) -> None:
        for file in self.files.values():
            os.fdatasync(file)


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _fingerprint(plan: Plan, origin: str) -> str:
    """Tells one job from another: what is written, where in which files, and from what."""
    digest = hashlib.sha256(f"{_VERSION} {origin}".encode())

    def add(*what: object) -> None:
        digest.update(repr(what).encode())

    add(plan.format, sorted(plan.files.items()), sorted(plan.extras.items()))
    for piece in plan.pieces:
        add(piece)
    for region in plan.regions:
        add(region.file, region.offset, region.nbytes, region.leaf.path, region.layer, region.rows)
    return digest.hexdigest()


def _is_as_left(plan: Plan, folder: Path) -> bool:
    """Whether all data files that the journal speaks of are there."""
    if plan.store is not None:
        return any(folder.iterdir())
    paths = {folder / file: size for file, size in plan.files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _clear(folder: Path) -> None:
    """Removes what another job has left."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _check_space(plan: Plan, folder: Path, target: Path) -> None:
    there = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    whole = sum(plan.files.values()) or sum(region.nbytes for region in plan.regions)
    needed = whole + sum(map(len, plan.extras.values())) - there
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{target}: needs {needed:,} bytes more and the disk has {free:,}; free some, or write elsewhere"
        )


@contextlib.contextmanager
def _allocated(path: Path, size: int) -> Iterator[int]:
    """Opens a data file of the planned size, with what it holds already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.truncate(file, size)
        yield file
    finally:
        os.close(file)
