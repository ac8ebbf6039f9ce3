"""Executing plans: output, interruptions, resuming, disk errors, progress and memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from llama_jax.errors import CheckpointError
from llama_jax.weights import open_source
from llama_jax.weights.tensors import ParamsTensors, StoredTensors
from llama_jax.weights.write import run, staging
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.random_models import random_model

NO_VOCABULARY = Vocabulary()
ROOT = Path(__file__).parents[2]


class CountingTensors(ParamsTensors):
    """Records the reads, and calls `callback` at the read number `at_read`."""

    def __init__(self, seed, at_read=None, callback=None):
        super().__init__(*random_model(seed))
        object.__setattr__(self, "reads", [])
        object.__setattr__(self, "at_read", at_read)
        object.__setattr__(self, "callback", callback)

    def read(self, leaf, layer):
        self.reads.append((leaf.path, layer))
        if len(self.reads) == self.at_read:
            self.callback()
        return super().read(leaf, layer)


def interrupt():
    raise KeyboardInterrupt


def write(tensors, target, **options):
    run.write(plan_hf(tensors, None, NO_VOCABULARY, shard_bytes=30_000), tensors, target, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_write_leaves_no_output_and_is_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    write(ParamsTensors(*random_model(1)), tmp_path / "uninterrupted")
    total = len(open_source(tmp_path / "uninterrupted").tensors)

    first = CountingTensors(1, at_read=total // 2, callback=interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(first, tmp_path / "out", origin="source")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        open_source(tmp_path / "out.partial" / "data")  # no config.json yet

    second = CountingTensors(1)
    write(second, tmp_path / "out", origin="source")
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")
    assert not (tmp_path / "out.partial").exists()
    repeated = set(first.reads) & set(second.reads)
    assert len(second.reads) < total
    assert len(repeated) <= 3  # those in flight


def test_another_origin_starts_over(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        write(CountingTensors(1, at_read=5, callback=interrupt), tmp_path / "out", origin="one")
    other = CountingTensors(1)
    write(other, tmp_path / "out", origin="another")
    assert len(other.reads) == len(open_source(tmp_path / "out").tensors)


def test_a_write_without_an_origin_is_never_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    for _ in range(2):
        tensors = CountingTensors(1, at_read=5, callback=interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(tensors, tmp_path / "out")
        assert len(tensors.reads) >= 5


@pytest.mark.parametrize(
    "damage", ["truncated journal", "missing journal", "invalid journal", "missing file", "truncated file"]
)
def test_a_damaged_partial_output(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(run, "_THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        write(CountingTensors(1, at_read=9, callback=interrupt), tmp_path / "out", origin="source")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    first = min((tmp_path / "out.partial" / "data").iterdir())
    if damage == "truncated journal":
        journal.write_bytes(journal.read_bytes()[:-5])
    elif damage == "missing journal":
        journal.unlink()
    elif damage == "invalid journal":
        journal.write_text(
            journal.read_text().splitlines()[0] + '\n{"1": null}\n[1, 2]\n{"a": 3}\n{"999999": 1}\n'
        )
    elif damage == "missing file":
        first.unlink()
    else:
        os.truncate(first, 10)
    write(CountingTensors(1), tmp_path / "out", origin="source")
    write(CountingTensors(1), tmp_path / "uninterrupted")
    assert contents(tmp_path / "out") == contents(tmp_path / "uninterrupted")


KILLED_SCRIPT = """
    import sys, time
    from pathlib import Path
    from llama_jax.weights import open_source
    from llama_jax.weights.tensors import StoredTensors
    from llama_jax.weights.write import run
    from llama_jax.weights.write.hf import plan_hf
    from llama_jax.weights.write.vocabulary import Vocabulary

    class Slow(StoredTensors):
        def read(self, leaf, layer):
            time.sleep(0.05)
            sys.stdout.write("read\\n")  # one write call, as there are two threads
            sys.stdout.flush()
            return super().read(leaf, layer)

    run._SYNC_BYTES = 1
    tensors = Slow(open_source(sys.argv[1]))
    plan = plan_hf(tensors, None, Vocabulary())
    run.write(plan, tensors, Path(sys.argv[2]), origin="source")
"""


def test_a_killed_process_is_resumed(tmp_path):
    write(ParamsTensors(*random_model(3)), tmp_path / "in")
    command = [sys.executable, "-c", textwrap.dedent(KILLED_SCRIPT), tmp_path / "in", tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for _ in range(6):
            assert process.stdout.readline() == "read\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    reads = []

    class Counting(StoredTensors):
        def read(self, leaf, layer):
            reads.append(leaf)
            return super().read(leaf, layer)

    tensors = Counting(open_source(tmp_path / "in"))
    run.write(plan_hf(tensors, None, Vocabulary()), tensors, tmp_path / "out", origin="source")
    assert len(reads) <= len(open_source(tmp_path / "in").tensors) - 3
    source, copy = (StoredTensors(open_source(tmp_path / name)).source for name in ("in", "out"))
    assert all(np.array_equal(source.read(name), copy.read(name)) for name in source.tensors)


def test_an_output_is_locked_against_other_processes(tmp_path):
    with (
        staging.staged(tmp_path / "out"),
        pytest.raises(CheckpointError, match="another process is writing it"),
        staging.staged(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_an_existing_target_is_not_touched(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    elif kind == "directory":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="already exists; remove it, or give another path"):
        write(ParamsTensors(*random_model(1)), target)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["other files", "file", "link"])
def test_an_unrelated_partial_path_is_not_touched(tmp_path, kind):
    partial = tmp_path / "out.partial"
    if kind == "file":
        partial.write_text("mine")
    else:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("mine")
        partial.symlink_to("mine") if kind == "link" else (tmp_path / "mine").rename(partial)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"out\.partial: is in the way; move it"):
        write(ParamsTensors(*random_model(1)), tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_target_that_cannot_be_created(tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "out", tmp_path / ("n" * 250)):
        with pytest.raises(CheckpointError, match=r"cannot be written: .*; write elsewhere$"):
            write(ParamsTensors(*random_model(1)), target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_insufficient_disk_space_is_reported_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ more bytes, and the disk has 1,000 free"):
        write(ParamsTensors(*random_model(1)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_and_the_write_can_be_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    real, calls = os.pwrite, []

    def failing(*args):
        calls.append(args)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", failing)
    with pytest.raises(CheckpointError, match="No space left on device; partial output is kept in"):
        write(ParamsTensors(*random_model(1)), tmp_path / "out", origin="source")
    monkeypatch.setattr(os, "pwrite", real)
    resumed = CountingTensors(1)
    write(resumed, tmp_path / "out", origin="source")
    assert len(resumed.reads) < len(open_source(tmp_path / "out").tensors)


def test_a_source_that_is_truncated_meanwhile_leaves_no_output(tmp_path):
    write(ParamsTensors(*random_model(1)), tmp_path / "in")
    tensors = StoredTensors(open_source(tmp_path / "in"))
    file = sorted((tmp_path / "in").glob("*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        write(tensors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_is_monotonic_and_ends_at_the_total(tmp_path):
    seen = []
    write(ParamsTensors(*random_model(1)), tmp_path / "out", progress=lambda *args: seen.append(args))
    done = [args[0] for args in seen]
    assert done == sorted(done)
    source = open_source(tmp_path / "out")
    assert done[0] == 0
    assert seen[-1][:2] == (seen[-1][1],) * 2 == (sum(info.nbytes for info in source.tensors.values()),) * 2


def test_memory_in_flight_is_bounded(tmp_path, monkeypatch):
    live, peak = [0], [0]
    monkeypatch.setattr(run, "_MAX_IN_FLIGHT", 0)  # one tensor at a time

    class Monitored(ParamsTensors):
        def read(self, leaf, layer):
            live[0] += 1
            peak[0] = max(peak[0], live[0])
            time.sleep(0.001)
            array = super().read(leaf, layer)
            live[0] -= 1
            return array

    write(Monitored(*random_model(1)), tmp_path / "out")
    assert peak[0] == 1


def test_the_journal_is_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        write(CountingTensors(1, at_read=5, callback=interrupt), tmp_path / "out", origin="source")
    first, *rest = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert set(json.loads(first)) == {"job"}
    assert rest


@pytest.mark.parametrize("planted", ["data", "lock", "journal.jsonl"])
def test_links_planted_in_a_partial_output_are_not_followed(planted, tmp_path):
    """Whoever may write beside the output could otherwise have files removed or emptied elsewhere."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    partial = tmp_path / "out.partial"
    (partial / "data").mkdir(parents=True)
    (partial / "lock").touch()
    if planted == "data":
        (partial / "data").rmdir()
    else:
        (partial / planted).unlink(missing_ok=True)
    (partial / planted).symlink_to(victim if planted == "data" else victim / "thesis.txt")
    with (
        pytest.raises(CheckpointError, match=r"out\.partial: is in the way; move it"),
        staging.staged(tmp_path / "out"),
    ):
        pass
    assert (victim / "thesis.txt").read_text() == "precious"
    assert not (tmp_path / "out").exists()
