"""Prepares a run's data: claims the folder, runs the three steps, goes on where a killed command stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from llama_jax.errors import DataError
from llama_jax.storage import StorePath, upload
from llama_jax.tokenizer import Tokenizer

from ..config.data import DataConfig
from ..data.files import INDEX
from ..data.prepared import COMMAND, read_manifest
from .chunks import read_counts
from .files import disk_errors, write_text
from .job import PLAN, WORK, Job, open_job
from .local import LocalRunner
from .manifest import write_manifests
from .shards import Shard, finished, plan_shards
from .stored import local_folder, remove_records

Progress = Callable[[str, int, int], None]


class Runner(Protocol):
    """What executes the steps. Both methods report the records done so far."""

    def tokenize(self, job: Job, chunks: Sequence[tuple[int, int]], progress: Callable[[int], None]) -> None:
        """Writes the chunks that are missing, then, unless they are kept, the duplicates of all."""

    def write_shards(self, job: Job, shards: Sequence[Shard], progress: Callable[[int], None]) -> None:
        """Writes shards."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to prepare.

    Attributes:
      runner: executes the steps.
      keep_duplicates: whether later copies of a document stay.
      progress: called with a step's name, the records done and all of them.
      note: called with a line of information.
    """

    runner: Runner = dataclasses.field(default_factory=LocalRunner)
    keep_duplicates: bool = False
    progress: Progress = lambda step, done, total: None
    note: Callable[[str], None] = lambda text: None


def prepare(
    config: DataConfig, tokenizer: Tokenizer, out: Path, *, seed: int, settings: Settings | None = None
) -> list[dict[str, Any]]:
    """Writes the folder `out`, which replaces the text in `data.files`.

    The batches are those of the text whose duplicates are empty, for every seed, sequence length and batch
    size. A mixture becomes the folders `out`/0, `out`/1, ... in its order, and `data.validation_files` become
    `out`/validation.

    Args:
      config: the `[data]` section.
      tokenizer: the model's.
      out: the folder: new, or with what an earlier call with the same arguments has left.
      seed: the run's, in whose first epoch the shards are read from front to back.
      settings: how.

    Returns:
      The manifest of each folder, see `manifest.write_manifests`.

    Raises:
      DataError: for text that cannot be read, and for a folder that cannot be written, that is in use, or
        that was begun with other arguments.
    """
    settings = settings or Settings()
    if isinstance(out, StorePath):
        return _prepare_in_store(config, tokenizer, out, seed, settings)
    job = open_job(config, tokenizer, out, seed=seed, keep_duplicates=settings.keep_duplicates)
    with disk_errors(out), _claimed(job) as resumed:
        if manifests := _manifests(job):
            shutil.rmtree(out / WORK, ignore_errors=True)
            settings.note(f"{out} is complete; there is nothing to do")
            return manifests
        if resumed:
            settings.note(f"going on with {out}")
        return _make(job, settings, resumed)


def _make(job: Job, settings: Settings, resumed: bool) -> list[dict[str, Any]]:
    _tokenize(job, settings, resumed)
    return write_manifests(job, _write_shards(job, settings))


def _prepare_in_store(
    config: DataConfig, tokenizer: Tokenizer, out: StorePath, seed: int, settings: Settings
) -> list[dict[str, Any]]:
    """Prepares on this machine's disk, and sends each shard when it is written, the manifests last."""
    if not isinstance(settings.runner, LocalRunner):
        raise DataError(
            f"{out} is in an object store, where only --runner local writes; give a path that all workers "
            "mount, and copy the folder when it is complete"
        )
    job = open_job(config, tokenizer, out, seed=seed, keep_duplicates=settings.keep_duplicates)
    if (out / PLAN).exists():
        _check_same(job, out / PLAN)
        if manifests := _manifests(job):
            remove_records(out)
            settings.note(f"{out} is complete; there is nothing to do")
            return manifests
        settings.note(f"going on with {out}")
    elif out.exists():
        raise DataError(f"{out} exists and was not begun by {COMMAND}; use another OUT, or remove it")
    else:
        (out / PLAN).write_text(json.dumps(job.settings, indent=1))
    work = dataclasses.replace(job, out=local_folder(out), store=out)
    if not _is_same(work):  # of an OUT of that name that is no longer there
        shutil.rmtree(work.out)
    with disk_errors(work.out), _claimed(work) as resumed:
        manifests = _manifests(work) or _make(work, settings, resumed)
        for i in range(len(work.sections)):
            upload(work.folder(i) / INDEX, out / work.sections[i].name / INDEX)
        remove_records(out)
        shutil.rmtree(work.out)
    return manifests


def _is_same(job: Job) -> bool:
    """Whether what is on the disk, if anything, was begun with the same settings."""
    try:
        _check_same(job, job.out / PLAN)
    except DataError:
        return not job.out.exists()
    return True


def _tokenize(job: Job, settings: Settings, resumed: bool) -> None:
    done_path = job.out / WORK / "tokenized"
    chunks = job.chunks()
    pending = [
        key for key in chunks if not resumed or read_counts(job.work("chunks", *key), check=True) is None
    ]
    if pending or not done_path.exists():
        done_path.unlink(missing_ok=True)
        total = sum(section.records for section in job.sections)
        before = total - sum(len(job.sections[i].chunk(n)) for i, n in pending)
        settings.progress("tokenizing", before, total)
        settings.runner.tokenize(
            job, pending, lambda done: settings.progress("tokenizing", before + done, total)
        )
        write_text(done_path, "")


def _write_shards(job: Job, settings: Settings) -> list[tuple[Shard, dict[str, Any]]]:
    tokens = [0] * len(job.sections)
    for section, number in job.chunks():
        tokens[section] += (read_counts(job.work("chunks", section, number)) or {"tokens": 0})["tokens"]
    shards = plan_shards(job, tokens)
    pending = [shard for shard in shards if finished(job, shard) is None]
    total = sum(len(shard.places) for shard in shards)
    before = total - sum(len(shard.places) for shard in pending)
    settings.progress("writing shards", before, total)
    settings.runner.write_shards(
        job, pending, lambda done: settings.progress("writing shards", before + done, total)
    )
    counted = [(shard, finished(job, shard)) for shard in shards]
    if missing := [shard for shard, counts in counted if counts is None]:
        path = job.folder(missing[0].section) / missing[0].name
        raise DataError(f"{path} is not what was written; run the same command again")
    return [(shard, counts) for shard, counts in counted if counts is not None]


def _manifests(job: Job) -> list[dict[str, Any]]:
    """Returns the manifests of a folder that is complete; none of one that is not."""
    paths = [job.folder(i) / INDEX for i in range(len(job.sections))]
    return [read_manifest(path) for path in paths] if all(path.is_file() for path in paths) else []


@contextlib.contextmanager
def _claimed(job: Job) -> Iterator[bool]:
    """Takes the folder for one job and one process; yields whether something is in it already."""
    plan = job.out / PLAN
    resumed = plan.exists()
    if resumed:
        _check_same(job, plan)
    elif job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
        raise DataError(f"{job.out} exists and was not begun by {COMMAND}; use another OUT, or remove it")
    else:
        write_text(plan, json.dumps(job.settings, indent=1))
    descriptor = os.open(plan, os.O_RDWR)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # another number: a file system without locks
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise DataError(f"{job.out} is being prepared by another process; wait for it") from None
        yield resumed
    finally:
        os.close(descriptor)


def _check_same(job: Job, plan: Path) -> None:
    """Raises DataError unless the folder was begun with the same settings."""
    try:
        begun = json.loads(plan.read_bytes())
        names = list(begun)
    except (OSError, ValueError, TypeError):
        raise DataError(f"{plan} cannot be read; remove {job.out}, or use another OUT") from None
    for name in dict.fromkeys([*job.settings, *names]):
        was, now = begun.get(name), job.settings.get(name)
        if was == now:
            continue
        if name == "sources" and [row[:2] for row in was or ()] == [row[:2] for row in now or ()]:
            problem = "the files have changed since"
        elif name == "sources":
            problem = f"with the files {_titles(was)}, and these are {_titles(now)}"
        elif name in ("tokenizer", "version"):
            problem = f"with another {name}" + (" or data.parse_special" if name == "tokenizer" else "")
        else:
            problem = f"with {name} = {json.dumps(was)}, and this is {json.dumps(now)}"
        raise DataError(f"{job.out} was begun {problem}; use another OUT, or remove it to begin again")


def _titles(rows: Any) -> str:
    with contextlib.suppress(TypeError, IndexError):
        return ", ".join(repr(row[1]) for row in rows)
    return "none"
