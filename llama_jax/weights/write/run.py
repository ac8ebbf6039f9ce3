"""Executes a plan: reads, encodes and writes tensors, several at a time.

A journal records the regions that have been written, so that an interrupted write can be resumed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import threading
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.errors import CheckpointError
from llama_jax.weights.names import Leaf
from llama_jax.weights.source import Progress
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.journal import Journal
from llama_jax.weights.write.plan import Plan, Region, Store
from llama_jax.weights.write.staging import JOURNAL, staged

_VERSION = 1  # of the encoders' output: a partial output of another version is not resumed
_THREADS = 2  # to overlap disk access and computation
_MAX_IN_FLIGHT = 512 << 20  # bytes of tensors in host memory; a larger tensor is processed alone
_SYNC_BYTES = 256 << 20  # bytes written between two updates of the journal


def write(
    plan: Plan, tensors: Tensors, target: Path, *, origin: str | None = None, progress: Progress | None = None
) -> None:
    """Writes an output, which appears at `target` only when it is complete.

    Host memory holds up to 512 MB of tensors, or the largest tensor if that is larger.

    Args:
      plan: the output layout.
      tensors: the tensors that `plan.regions` refer to.
      target: the output path, which must not exist.
      origin: identifies the contents of `tensors`; an interrupted write with the same plan and origin is
        resumed. None always starts over.
      progress: called with (bytes written, total bytes, name of what was written).

    Raises:
      CheckpointError: if `target` exists, a tensor cannot be read or encoded, or the disk is full.
    """
    name = next(iter(plan.files)) if plan.single_file else None
    with staged(target, name) as folder:
        resume = origin is not None and _is_resumable(plan, folder)
        job = _fingerprint(plan, origin or "")
        journal = Journal(folder.parent / JOURNAL, job, len(plan.regions), resume=resume)
        if not journal.completed:
            _clear(folder)
        _check_space(plan, folder, target)
        with _FileStore.open(plan, folder) if plan.store is None else plan.store(folder) as store:
            checksums = _Writer(plan, tensors, store, journal, progress).run()
            if isinstance(store, _FileStore):
                for blob in itertools.chain(plan.blobs, plan.finish(checksums) if plan.finish else ()):
                    store.write_bytes(blob.file, memoryview(blob.data), blob.offset)
        for file, data in plan.extras.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)


class _Job(NamedTuple):
    """One tensor, and the indices of its regions."""

    leaf: Leaf
    layer: int | None
    regions: Sequence[int]

    @property
    def name(self) -> str:
        return self.leaf.name("hf", self.layer)


class _Writer:
    """Writes the regions of a plan."""

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
        self.written = sum(plan.regions[index].nbytes for index in journal.completed)
        self.stop = threading.Event()

    def run(self) -> list[int]:
        """Writes the regions that are not in the journal; returns the CRC-32 of every region."""
        unsynced = 0
        self.progress(self.written, self.total, "")
        with ThreadPoolExecutor(_THREADS) as pool:
            try:
                for job, checksums in self._results(pool):
                    nbytes = sum(self.plan.regions[index].nbytes for index in job.regions)
                    self.journal.add(checksums)
                    unsynced += nbytes
                    if unsynced >= _SYNC_BYTES:
                        self._sync()
                        unsynced = 0
                    self.written += nbytes
                    self.progress(self.written, self.total, job.name)
            finally:
                self.stop.set()
                self._sync()
        return [self.journal.completed[index] for index in range(len(self.plan.regions))]

    def _results(self, pool: ThreadPoolExecutor) -> Iterator[tuple[_Job, dict[int, int]]]:
        """Runs the jobs within the memory limit and yields the completed ones, in any order."""
        running: dict[Future[dict[int, int]], tuple[_Job, int]] = {}
        in_flight = 0
        for job in self._jobs():
            cost = self._cost(job)
            while running and (in_flight + cost > _MAX_IN_FLIGHT or len(running) > _THREADS):
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
        pending = [index for index in range(len(self.plan.regions)) if index not in self.journal.completed]

        def tensor(index: int) -> tuple[tuple[str, ...], int, int]:
            region = self.plan.regions[index]
            layer, expert = region.layer, region.leaf.expert
            return region.leaf.path, -1 if layer is None else layer, -1 if expert is None else expert

        if self.tensors.stacked:
            pending.sort(key=tensor)

        for _, group in itertools.groupby(pending, tensor):
            indices = list(group)
            region = self.plan.regions[indices[0]]
            yield _Job(region.leaf, region.layer, indices)

    def _cost(self, job: _Job) -> int:
        """Approximate host memory of a job in bytes: the tensor as read, reordered, and encoded."""
        size = int(np.prod(job.leaf.stored_shape(self.tensors.config, "hf")))
        stored = size * self.tensors.dtype(job.leaf, job.layer).itemsize
        return 2 * stored + max(self.plan.regions[index].nbytes for index in job.regions)

    def _write(self, job: _Job) -> dict[int, int]:
        if self.stop.is_set():
            return {}
        tensor, checksums = self.tensors.read(job.leaf, job.layer), {}
        for index in job.regions:
            region = self.plan.regions[index]
            part = tensor if region.index is None else tensor[region.index]
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


class _FileStore:
    """The data files of a plan, open for writing."""

    def __init__(self, files: dict[str, int]) -> None:
        self.files = files

    @classmethod
    @contextlib.contextmanager
    def open(cls, plan: Plan, folder: Path) -> Iterator[_FileStore]:
        with contextlib.ExitStack() as stack:
            yield cls(
                {
                    file: stack.enter_context(_open_with_size(folder / file, size))
                    for file, size in plan.files.items()
                }
            )

    def write(self, region: Region, data: np.ndarray) -> None:
        self.write_bytes(region.file, _bytes_of(data), region.offset)

    def write_bytes(self, file: str, data: memoryview, offset: int) -> None:
        while data:  # one call writes at most 2 GB
            count = os.pwrite(self.files[file], data, offset)
            data, offset = data[count:], offset + count

    def sync(self) -> None:
        for file in self.files.values():
            os.fdatasync(file)


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _fingerprint(plan: Plan, origin: str) -> str:
    """A hash of the output layout and of the origin of its tensors."""
    digest = hashlib.sha256(f"{_VERSION} {origin}".encode())

    def add(*values: object) -> None:
        digest.update(repr(values).encode())

    add(plan.format, sorted(plan.files.items()), sorted(plan.extras.items()))
    for blob in plan.blobs:
        add(blob)
    for region in plan.regions:
        leaf = region.leaf
        add(region.file, region.offset, region.nbytes, leaf.path, leaf.expert, region.layer, region.index)
    return digest.hexdigest()


def _is_resumable(plan: Plan, folder: Path) -> bool:
    """Whether all data files exist with their planned sizes."""
    if plan.store is not None:
        return any(folder.iterdir())
    paths = {folder / file: size for file, size in plan.files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _clear(folder: Path) -> None:
    """Removes the files of another job."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _check_space(plan: Plan, folder: Path, target: Path) -> None:
    existing = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    total = sum(plan.files.values()) or sum(region.nbytes for region in plan.regions)
    needed = total + sum(map(len, plan.extras.values())) - existing
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{target}: needs {needed:,} more bytes, and the disk has {free:,} free; free some space, "
            "or write elsewhere"
        )


@contextlib.contextmanager
def _open_with_size(path: Path, size: int) -> Iterator[int]:
    """Opens or creates a data file of the planned size; existing data is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.truncate(file, size)
        yield file
    finally:
        os.close(file)
