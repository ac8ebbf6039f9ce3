"""Runs the command `train` in processes: a tiny configuration, and readers of what a run writes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.train.fork_server import ROOT, ForkServer, Process

# A corpus with few distinct characters, so that a vocabulary of 300 has room for merges.
_TEXT = "the cat sat on a mat and then it ran after ten rats in the rain"

CONFIG = """\
[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64
[tokenizer]
vocab_size = 300
[data]
files = "{files}"
validation_fraction = 0.2
[train]
global_batch_size = 8
seq_len = 32
dtype = "float32"
remat = "none"
attention = "xla"
loss_chunks = 1
[optimizer]
learning_rate = 1e-2
warmup_steps = 5
schedule = "constant"
[eval]
every = 10
max_new_tokens = 0
[log]
every = 1
tensorboard = false
plot = false
"""


@dataclasses.dataclass(frozen=True)
class Done:
    """A finished process."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one-line error message; fails on tracebacks and anything after it."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and self.err.splitlines()[-1] == lines[0], self.err
        return lines[0].removeprefix("error: ")


@dataclasses.dataclass(frozen=True)
class Workshop:
    """A directory with a configuration and its corpus, in which tests run training processes.

    Attributes:
      folder: the directory.
      server: starts the processes.
    """

    folder: Path
    server: ForkServer

    @property
    def config(self) -> Path:
        return self.folder / "tiny.toml"

    def set_up(self) -> Workshop:
        text = self.folder / "text"
        text.mkdir()
        for name in range(16):
            rng = np.random.default_rng(name)
            lines = [" ".join(rng.choice(_TEXT.split(), 8)) for _ in range(60)]
            (text / f"{name}.txt").write_text(".\n".join(lines))
        self.config.write_text(CONFIG.format(files=f"{text}/*.txt"))
        return self

    def start(self, *arguments: object, devices: int = 1, verb: str = "train") -> Process:
        """Starts `llama-jax VERB ARGUMENTS ...`."""
        return self.server.start("llama_jax.cli:main", (verb, *arguments), devices=devices, cwd=self.folder)

    def run(self, *arguments: object, verb: str = "train", devices: int = 1, worker: int = 1) -> Done:
        """Runs a command in the worker of this number, which runs others too."""
        worker_process = self.server.worker(devices, worker)
        return Done(*worker_process.run((verb, *arguments), self.folder))

    def run_all(self, *commands: Sequence[object], **more: int) -> list[Done]:
        """Runs several commands, each of a verb and its arguments."""
        return [self.run(*arguments, verb=str(verb), **more) for verb, *arguments in commands]

    def train_all(self, *commands: Sequence[object], **more: int) -> list[Done]:
        """Trains several times; each must succeed."""
        done = self.run_all(*[("train", *command) for command in commands], **more)
        assert [each.status for each in done] == [0] * len(done), done
        return done

    def train(self, run_dir: str, *arguments: object, status: int = 0, **more: int) -> Done:
        """Trains in `folder/run_dir`."""
        done = self.run(self.config, "--train.run_dir", run_dir, *arguments, **more)
        assert done.status == status, (done.status, done.err)
        return done


def environment(cache: Path) -> dict[str, str]:
    """Of all training processes, which share a compilation cache."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "OPENBLAS_NUM_THREADS": "1",  # no threads before the fork
        "COLUMNS": "500",
    }


def finish(process: Process, timeout: float = 120) -> Done:
    """Waits for a process; kills it after the timeout."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.wait()
    return Done(process.returncode, out, err)


@contextlib.contextmanager
def running(process: Process) -> Iterator[Process]:
    """Kills a process at the end of the block."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: Process, timeout: float = 60) -> None:
    """Waits until a condition holds; fails if the process ends before."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The complete lines of a run's metrics."""
    lines = (run / name).read_text().splitlines() if (run / name).exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; checks that every step was recorded once."""
    found = records(run)
    by_step = {record["step"]: record["loss"] for record in found}
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return by_step


def steps(run: Path) -> list[int]:
    """The steps with a committed checkpoint."""
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def interrupted(run: Path) -> Path:
    """A copy of a run as if it had been killed before its last checkpoint was committed."""
    copy = Path(shutil.copytree(run, f"{run}_interrupted", ignore=shutil.ignore_patterns("adapter")))
    first, last = steps(copy)
    assert last == 2 * first
    shutil.rmtree(copy / "checkpoints" / str(last))
    return copy


def checkpoint_contents(run: Path, step: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, Any]]:
    """Every array of a checkpoint by name, and the data states of all processes."""
    import jax

    from llama_jax.weights.orbax_tree import read_tree, tree_metadata

    folder = run / "checkpoints" / str(step)
    arrays = {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for part in ("params", "state"):
        tree: dict[str, Any] = {}
        for name, info in tree_metadata(folder / part).items():
            *parents, last = name.split(".") if part == "params" else [name]
            inner = tree
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=here)
        for path, leaf in jax.tree_util.tree_leaves_with_path(read_tree(folder / part, tree)):
            arrays[f"{part}:{jax.tree_util.keystr(path, simple=True, separator='.')}"] = np.asarray(leaf)
    lanes: dict[str, Any] = {}
    for path in (folder / "data").glob("process_*.json"):
        state = json.loads(path.read_text())
        lanes |= state.get("lanes", state)  # completions are not of lanes
    return arrays, lanes


def assert_same(left: Path, right: Path, step: int) -> None:
    """Asserts that two checkpoints are equal bit for bit: parameters, moments, counters, keys, data state."""
    (a, data_a), (b, data_b) = checkpoint_contents(left, step), checkpoint_contents(right, step)
    assert a.keys() == b.keys() and len(a) > 10
    different = [
        name for name in a if (a[name].dtype, a[name].tobytes()) != (b[name].dtype, b[name].tobytes())
    ]
    assert not different
    assert data_a == data_b and len(data_a) == 8
