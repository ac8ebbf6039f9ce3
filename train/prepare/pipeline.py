"""The steps on Apache Beam, by any of its runners.

Workers read the text and write OUT, which must be paths that all of them have. Two pipelines: the first
tokenizes, and groups the documents' hashes to find duplicates; the second groups the documents by shard. The
job itself is a file in OUT, since runners limit the size of a pipeline. A bundle that is retried, or that
runs twice at once, writes the same files again, each under its final name when it is complete.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.console.parser import UsageError, suggestion
from llama_jax.errors import DataError, LlamaJaxError
from llama_jax.storage.atomic import atomic_file

from .chunks import write_chunk
from .duplicates import chunk_of, digest_pairs, write_duplicates
from .files import disk_errors, write_text
from .job import WORK, Job
from .shards import Shard, scatter, write_shard

RUNNERS = {
    # Beam's DirectRunner would first look for a Prism binary on the network.
    "direct": "apache_beam.runners.portability.fn_api_runner.FnApiRunner",
    "prism": "PrismRunner",
    "dataflow": "DataflowRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
    "portable": "PortableRunner",
}
_OPEN_OPTIONS = (
    "flink",
    "spark",
    "portable",
)  # runners whose job servers have options that Beam does not know
_FAILED = "failed"
_POLL_SECONDS = 1.0


class BeamRunner:
    """Runs the steps as Beam pipelines."""

    def __init__(self, name: str, options: Sequence[str] = ()):
        """`name` is one of `RUNNERS`; `options` are Beam's own.

        Raises:
          UsageError: if Beam is not installed, or does not know an option.
        """
        beam = _beam()
        from apache_beam.options.pipeline_options import PipelineOptions

        flags = [f"--runner={RUNNERS[name]}", *options]
        with _quiet():
            known = PipelineOptions(flags).get_all_options()
            kept = PipelineOptions(flags).get_all_options(retain_unknown_options=True)
        unknown = [option for option in kept if option not in known]
        if unknown and name not in _OPEN_OPTIONS:
            hint = suggestion(f"--{unknown[0]}", [f"--{option}" for option in known])
            raise UsageError(f"unknown option --{unknown[0]}, which Beam does not have either{hint}")
        self._pipeline: Callable[[], Any] = lambda: beam.Pipeline(options=PipelineOptions(flags))

    def tokenize(self, job: Job, chunks: Sequence[tuple[int, int]], progress: Callable[[int], None]) -> None:
        beam, path = _beam(), _save(job)
        pipeline = self._pipeline()
        hashes = (
            pipeline
            | "chunks" >> beam.Create(job.chunks())
            | "spread chunks" >> beam.Reshuffle()
            | "tokenize" >> beam.FlatMap(_tokenize, path)
        )
        if not job.keep_duplicates:
            _ = (
                hashes
                | "equal documents" >> beam.GroupByKey()
                | "later copies" >> beam.FlatMap(_later_copies, path)
                | "by chunk" >> beam.GroupByKey()
                | "write duplicates" >> beam.Map(_write_duplicates, path)
            )
        sizes = {
            job.work("chunks", i, n).with_suffix(".json"): len(job.sections[i].chunk(n)) for i, n in chunks
        }
        _run(job, pipeline, sizes, progress)

    def write_shards(self, job: Job, shards: Sequence[Shard], progress: Callable[[int], None]) -> None:
        beam, path = _beam(), _save(job)
        with disk_errors(job.out), atomic_file(job.out / WORK / "shards.pickle") as partial:
            partial.write_bytes(pickle.dumps(list(shards)))
        sections = {shard.section for shard in shards}
        pipeline = self._pipeline()
        _ = (
            pipeline
            | "chunks" >> beam.Create([key for key in job.chunks() if key[0] in sections])
            | "spread chunks" >> beam.Reshuffle()
            | "scatter" >> beam.FlatMap(_scatter, path)
            | "by shard" >> beam.GroupByKey()
            | "write shards" >> beam.Map(_write_shard, path)
        )
        sizes = {job.folder(shard.section) / shard.name: len(shard.places) for shard in shards}
        if shards:
            _run(job, pipeline, sizes, progress)


def _beam() -> Any:
    try:
        with _quiet():
            import apache_beam
    except ImportError as error:
        raise UsageError(
            f"this runner needs {error.name}: pip install 'llama-jax[beam]', or in a clone -e '.[beam]'; "
            "--runner local needs nothing more"
        ) from None
    return apache_beam


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Beam's warnings about what is not installed, and its own on options, from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _save(job: Job) -> str:
    path = job.out / WORK / "job.pickle"
    with disk_errors(job.out), atomic_file(path) as partial:
        partial.write_bytes(pickle.dumps(job))
    (job.out / WORK / _FAILED).unlink(missing_ok=True)
    _load.cache_clear()
    _load_shards.cache_clear()
    return str(path)


@functools.lru_cache(1)
def _load(path: str) -> Job:
    job: Job = pickle.loads(Path(path).read_bytes())
    return job


@functools.lru_cache(1)
def _load_shards(path: str) -> list[Shard]:
    shards: list[Shard] = pickle.loads(Path(path).with_name("shards.pickle").read_bytes())
    return shards


def _run(job: Job, pipeline: Any, sizes: dict[Path, int], progress: Callable[[int], None]) -> None:
    """Runs a pipeline, reports the records of the files that it has written, and raises its error."""
    ended = threading.Event()

    def watch() -> None:
        pending, done = dict(sizes), 0
        while not ended.wait(_POLL_SECONDS):
            for path in [path for path in pending if path.exists()]:
                done += pending.pop(path)
            progress(done)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    logged = logging.getLogger("apache_beam").level
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    try:
        result = pipeline.run()
        state = result.wait_until_finish() or result.state
    except Exception as error:
        raise _error(job, error) from None
    finally:
        logging.getLogger("apache_beam").setLevel(logged)
        ended.set()
        watcher.join()
    if state != "DONE":
        raise _error(job, RuntimeError(f"the pipeline ended as {state}"))


def _error(job: Job, error: Exception) -> DataError:
    """Returns what a worker has said, or the runner's error in one line."""
    with contextlib.suppress(OSError, ValueError):
        return DataError(json.loads((job.out / WORK / _FAILED).read_bytes())["error"])
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return DataError(f"the Beam pipeline failed: {lines[-1].strip()[:300]}")


@contextlib.contextmanager
def _reported(job: Job) -> Iterator[None]:
    """Leaves an error where the command finds it: runners wrap it in tracebacks, each in its own way."""
    try:
        yield
    except LlamaJaxError as error:
        with contextlib.suppress(OSError):
            write_text(job.out / WORK / _FAILED, json.dumps({"error": str(error)}))
        raise


def _tokenize(key: tuple[int, int], path: str) -> Iterator[tuple[bytes, int]]:
    job = _load(path)
    with _reported(job):
        write_chunk(job, *key)
        if not job.keep_duplicates:
            yield from digest_pairs(job, *key)


def _later_copies(pair: tuple[bytes, Iterable[int]], path: str) -> Iterator[tuple[tuple[int, int], int]]:
    job = _load(path)
    for priority in sorted(set(pair[1]))[1:]:
        section, chunk, number = chunk_of(job, priority)
        yield (section, chunk), number


def _write_duplicates(pair: tuple[tuple[int, int], Iterable[int]], path: str) -> None:
    job = _load(path)
    with _reported(job):
        write_duplicates(job, *pair[0], pair[1])


def _scatter(key: tuple[int, int], path: str) -> Iterator[tuple[int, tuple[int, bytes]]]:
    job = _load(path)
    section, number = key
    shards = {i: shard for i, shard in enumerate(_load_shards(path)) if shard.section == section}
    with _reported(job):
        indices = list(shards)
        for index, place, record in scatter(job, section, number, shards.values()):
            yield indices[index], (place, record)


def _write_shard(pair: tuple[int, Iterable[tuple[int, bytes]]], path: str) -> None:
    job = _load(path)
    shard = _load_shards(path)[pair[0]]
    with _reported(job):
        by_place = dict(pair[1])  # a place that comes twice is the same record
        write_shard(job, shard, (by_place[place] for place in sorted(by_place)))
