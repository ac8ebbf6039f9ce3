"""The runner of plans: what it writes, what an interruption leaves, and that it goes on where it stopped."""

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

NONE = Vocabulary()
ROOT = Path(__file__).parents[2]


class Counting(ParamsTensors):
    """Counts what is read, and fails, or calls something, at one of the reads."""

    def __init__(self, seed, at=None, do=None):
        super().__init__(*random_model(seed))
        object.__setattr__(self, "reads", [])
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "do", do)

    def read(self, leaf, layer):
        self.reads.append((leaf.path, layer))
        if len(self.reads) == self.at:
            self.do()
        return super().read(leaf, layer)


def interrupt():
    raise KeyboardInterrupt


def write(tensors, target, **options):
    run.write(plan_hf(tensors, None, NONE, shard_bytes=30_000), tensors, target, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_run_leaves_nothing_that_looks_whole_and_goes_on_where_it_stopped(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "_THREADS", 1)
    write(ParamsTensors(*random_model(1)), tmp_path / "straight")
    total = len(open_source(tmp_path / "straight").tensors)

    first = Counting(1, at=total // 2, do=interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(first, tmp_path / "out", origin="it")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError):
        open_source(tmp_path / "out.partial" / "data")  # it has no config.json yet

    second = Counting(1)
    write(second, tmp_path / "out", origin="it")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert not (tmp_path / "out.partial").exists()
    again = set(first.reads) & set(second.reads)
    assert len(second.reads) < total
    assert len(again) <= 3  # those that were in flight


def test_another_job_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        write(Counting(1, at=5, do=interrupt), tmp_path / "out", origin="one")
    other = Counting(1)
    write(other, tmp_path / "out", origin="another")
    assert len(other.reads) == len(open_source(tmp_path / "out").tensors)


def test_a_job_without_an_origin_never_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    for _ in range(2):
        tensors = Counting(1, at=5, do=interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(tensors, tmp_path / "out")
        assert len(tensors.reads) >= 5


@pytest.mark.parametrize(
    "damage", ["journal cut", "journal gone", "journal nonsense", "file gone", "file cut"]
)
def test_what_is_left_may_be_damaged(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(run, "_THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        write(Counting(1, at=9, do=interrupt), tmp_path / "out", origin="it")
    journal = tmp_path / "out.partial" / "journal.jsonl"
    first = min((tmp_path / "out.partial" / "data").iterdir())
    if damage == "journal cut":
        journal.write_bytes(journal.read_bytes()[:-5])
    elif damage == "journal gone":
        journal.unlink()
    elif damage == "journal nonsense":
        journal.write_text(
            journal.read_text().splitlines()[0] + '\n{"1": null}\n[1, 2]\n{"a": 3}\n{"999999": 1}\n'
        )
    elif damage == "file gone":
        first.unlink()
    else:
        os.truncate(first, 10)
    write(Counting(1), tmp_path / "out", origin="it")
    write(Counting(1), tmp_path / "straight")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


KILLED = """
    import sys, time
    from pathlib import Path
    from llama_jax.weights import open_source
    from llama_jax.weights.tensors import StoredTensors
    from llama_jax.weights.write import run
    from llama_jax.weights.write.hf import plan_hf
    from llama_jax.weights.write.vocabulary import Vocabulary

    class Slow(StoredTensors):
        def read(self, leaf, layer):
            time.sleep(float(sys.argv[3]))
            sys.stdout.write("read\\n")  # in one piece, whatever the other thread writes
            sys.stdout.flush()
            return super().read(leaf, layer)

    run._SYNC_EVERY = 1
    tensors = Slow(open_source(sys.argv[1]))
    plan = plan_hf(tensors, None, Vocabulary())
    run.write(plan, tensors, Path(sys.argv[2]), origin="it")
"""


def test_a_killed_process_leaves_its_work_to_the_next(tmp_path):
    write(ParamsTensors(*random_model(3)), tmp_path / "in")
    command = [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path / "in", tmp_path / "out"]
    with subprocess.Popen([*command, "0.05"], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for _ in range(6):
            assert process.stdout.readline() == "read\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    done = subprocess.run([*command, "0"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    total = len(open_source(tmp_path / "in").tensors)
    assert done.stdout.count("read") <= total - 3
    one, other = (StoredTensors(open_source(tmp_path / name)).source for name in ("in", "out"))
    assert all(np.array_equal(one.read(name), other.read(name)) for name in one.tensors)


def test_only_one_process_writes_an_output(tmp_path):
    with (
        staging.staged(tmp_path / "out"),
        pytest.raises(CheckpointError, match="another process is writing it"),
        staging.staged(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("kind", ["file", "directory", "link to nowhere"])
def test_what_is_there_already_is_left_alone(tmp_path, kind):
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    elif kind == "directory":
        target.mkdir()
        (target / "mine").write_text("mine")
    else:
        target.symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match="is there already; remove it, or give another path"):
        write(ParamsTensors(*random_model(1)), target)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["files of others", "file", "link"])
def test_what_is_in_the_way_of_the_work_is_left_alone(tmp_path, kind):
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


def test_what_cannot_even_be_begun_promises_nothing(tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "out", tmp_path / ("n" * 250)):
        with pytest.raises(CheckpointError, match=r"cannot be written: .*; write elsewhere$"):
            write(ParamsTensors(*random_model(1)), target)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes more and the disk has 1,000"):
        write(ParamsTensors(*random_model(1)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_meanwhile_is_one_line_and_the_work_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    real, calls = os.pwrite, []

    def full(*args):
        calls.append(args)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(CheckpointError, match="No space left on device; what is done is kept in"):
        write(ParamsTensors(*random_model(1)), tmp_path / "out", origin="it")
    monkeypatch.setattr(os, "pwrite", real)
    rest = Counting(1)
    write(rest, tmp_path / "out", origin="it")
    assert len(rest.reads) < len(open_source(tmp_path / "out").tensors)


def test_a_source_that_cannot_be_read_on_leaves_no_output(tmp_path):
    write(ParamsTensors(*random_model(1)), tmp_path / "in")
    tensors = StoredTensors(open_source(tmp_path / "in"))
    file = sorted((tmp_path / "in").glob("*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        write(tensors, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_counts_every_byte_and_never_goes_back(tmp_path):
    seen = []
    write(ParamsTensors(*random_model(1)), tmp_path / "out", progress=lambda *at: seen.append(at))
    done = [at[0] for at in seen]
    assert done == sorted(done)
    source = open_source(tmp_path / "out")
    assert done[0] == 0
    assert seen[-1][:2] == (seen[-1][1],) * 2 == (sum(info.nbytes for info in source.tensors.values()),) * 2


def test_memory_in_flight_is_bounded(tmp_path, monkeypatch):
    held, most = [0], [0]
    monkeypatch.setattr(run, "_IN_FLIGHT", 0)  # so each tensor goes alone

    class Watched(ParamsTensors):
        def read(self, leaf, layer):
            held[0] += 1
            most[0] = max(most[0], held[0])
            time.sleep(0.001)
            array = super().read(leaf, layer)
            held[0] -= 1
            return array

    write(Watched(*random_model(1)), tmp_path / "out")
    assert most[0] == 1


def test_the_journal_is_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_THREADS", 1)
    with pytest.raises(KeyboardInterrupt):
        write(Counting(1, at=5, do=interrupt), tmp_path / "out", origin="it")
    first, *rest = (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()
    assert set(json.loads(first)) == {"job"}
    assert rest
