"""The steps on the cores of this machine."""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from llama_jax.errors import DataError

from ..data.batches import init_worker
from .chunks import write_chunk
from .duplicates import find_duplicates
from .job import Job
from .shards import Shard, gather, write_shard

T = TypeVar("T")
_jobs: list[Job] = []  # the one of this worker process


class LocalRunner:
    """Runs the steps in processes of this machine, or in this one if there is one worker or one piece."""

    def __init__(self, workers: int = 1):
        """`workers` is the number of processes; 0 is one a core."""
        self._workers = workers or len(os.sched_getaffinity(0))

    def tokenize(self, job: Job, chunks: Sequence[tuple[int, int]], progress: Callable[[int], None]) -> None:
        done = 0
        for section, number in self._each(job, chunks, _write_chunk):
            done += len(job.sections[section].chunk(number))
            progress(done)
        if not job.keep_duplicates:
            find_duplicates(job)

    def write_shards(self, job: Job, shards: Sequence[Shard], progress: Callable[[int], None]) -> None:
        done = 0
        for shard in self._each(job, shards, _write_shard):
            done += len(shard.places)
            progress(done)

    def _each(self, job: Job, items: Sequence[T], function: Callable[[Job, T], None]) -> Iterator[T]:
        """Calls a function with each item, and yields the items as they are done."""
        workers = min(self._workers, len(items))
        if workers <= 1:
            for item in items:
                function(job, item)
                yield item
            return
        context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would lose
        start = functools.partial(_start_worker, job)
        with concurrent.futures.ProcessPoolExecutor(workers, context, start) as pool:
            try:
                pending = {pool.submit(_call, function, item): item for item in items}
                for future in concurrent.futures.as_completed(pending):
                    future.result()
                    yield pending[future]
            except BrokenProcessPool:
                raise DataError(
                    "a worker process died, perhaps for lack of memory; run the same command again with "
                    "fewer --workers: it goes on where it stopped"
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.terminate()
                raise


def _start_worker(job: Job) -> None:
    init_worker(0, 0)
    _jobs[:] = [job]


def _call(function: Callable[[Job, Any], None], item: Any) -> None:
    function(_jobs[0], item)


def _write_chunk(job: Job, key: tuple[int, int]) -> None:
    write_chunk(job, *key)


def _write_shard(job: Job, shard: Shard) -> None:
    write_shard(job, shard, gather(job, shard))
