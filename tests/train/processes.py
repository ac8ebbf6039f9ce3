"""Real processes of `python -m llama_jax.train`: a tiny run's configuration, and what it left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]

# A corpus of few distinct characters, so that a vocabulary of 300 has room for merges.
_WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "ran",
    "after",
    "ten",
    "rats",
    "in",
    "the",
    "rain",
]

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
    """How a process ended."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a failure, with all that a user must never see ruled out."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and self.err.splitlines()[-1] == lines[0], self.err
        return lines[0].removeprefix("error: ")


@dataclasses.dataclass(frozen=True)
class Workshop:
    """A folder with a configuration and its text, and the means to train there.

    Attributes:
      folder: where everything is.
      cache: of compiled programs, shared by all processes.
    """

    folder: Path
    cache: Path

    @property
    def config(self) -> Path:
        return self.folder / "tiny.toml"

    def set_up(self) -> Workshop:
        text = self.folder / "text"
        text.mkdir()
        for name in range(16):
            rng = np.random.default_rng(name)
            lines = [" ".join(rng.choice(_WORDS, 8)) for _ in range(60)]
            (text / f"{name}.txt").write_text(".\n".join(lines))
        self.config.write_text(CONFIG.format(files=f"{text}/*.txt"))
        return self

    def start(
        self, *words: object, devices: int = 1, verb: str = "train", **more: Any
    ) -> subprocess.Popen[str]:
        """Starts `llama-jax VERB words ...`."""
        module = ["-m", "llama_jax.train"] if verb == "train" else ["-m", "llama_jax.cli", verb]
        return subprocess.Popen(
            [sys.executable, *module, *map(str, words)],
            env=os.environ | self.environment(devices) | more.pop("env", {}),
            cwd=self.folder,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **more,
        )

    def environment(self, devices: int) -> dict[str, str]:
        return {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "COLUMNS": "500",
        }

    def run(self, *words: object, verb: str = "train", **more: Any) -> Done:
        """Runs a command to its end."""
        return finish(self.start(*words, verb=verb, **more))

    def train(self, run_dir: str, *words: object, status: int = 0, **more: Any) -> Done:
        """Trains in `folder/run_dir`."""
        done = self.run(self.config, "--train.run_dir", run_dir, *words, **more)
        assert done.status == status, (done.status, done.err)
        return done


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Done:
    """Waits for a process, and kills it should it hang."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
        process.wait()
    return Done(process.returncode, out, err)


@contextlib.contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Sees to it that a process ends with the block."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 60) -> None:
    """Waits until something is so; fails if the process ends before."""
    end = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def records(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a run's metrics that are whole."""
    lines = (run / name).read_text().splitlines() if (run / name).exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run: Path) -> dict[int, float]:
    """Loss by step; every step was recorded once."""
    found = records(run)
    by_step = {record["step"]: record["loss"] for record in found}
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return by_step


def steps(run: Path) -> list[int]:
    """The steps of which a checkpoint was committed."""
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit())


def everything(run: Path, step: int) -> tuple[Mapping[str, np.ndarray], Mapping[str, Any]]:
    """All that one checkpoint holds: every array by its name, and every process's data state."""
    import jax

    from llama_jax.weights.orbax import describe_tree, read_tree

    folder = run / "checkpoints" / str(step)
    arrays = {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for part in ("params", "state"):
        tree: dict[str, Any] = {}
        for name, info in describe_tree(folder / part).items():
            *parents, last = name.split(".") if part == "params" else [name]
            inner = tree
            for parent in parents:
                inner = inner.setdefault(parent, {})
            inner[last] = jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=here)
        for path, leaf in jax.tree_util.tree_leaves_with_path(read_tree(folder / part, tree)):
            arrays[f"{part}:{jax.tree_util.keystr(path, simple=True, separator='.')}"] = np.asarray(leaf)
    lanes: dict[str, Any] = {}
    for path in (folder / "data").glob("process_*.json"):
        lanes |= json.loads(path.read_text())["lanes"]
    return arrays, lanes


def assert_same(left: Path, right: Path, step: int) -> None:
    """Asserts that two runs are at the same place bit for bit: parameters, moments, counters, keys, data."""
    (a, data_a), (b, data_b) = everything(left, step), everything(right, step)
    assert a.keys() == b.keys() and len(a) > 10
    different = [
        name for name in a if (a[name].dtype, a[name].tobytes()) != (b[name].dtype, b[name].tobytes())
    ]
    assert not different
    assert data_a == data_b and len(data_a) == 8


def interrupt(process: subprocess.Popen[str], number: signal.Signals = signal.SIGTERM) -> None:
    process.send_signal(number)
