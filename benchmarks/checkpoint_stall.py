"""How long saving a checkpoint stops training, against copying the state to the host, and what it reads.

    python -m benchmarks.checkpoint_stall [--layers 30] [--saves 3] [--json]

Saves a state of f32 parameters and Adam moments, by default as large as SmolLM2-135M's, while the next steps
donate it; then restores it. Prints medians: the copy of the state to host memory, which no save can do
without, the time in which `save` does not return, and the time until the step is committed; and the bytes
that the process reads and writes per save and restore.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import llama_jax as lj
from llama_jax.train.checkpoints.checkpoints import Checkpoints
from llama_jax.train.config.checkpoint import CheckpointConfig
from llama_jax.train.config.optimizer import OptimizerConfig
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import create_state

LAYERS = 30  # of SmolLM2-135M


def process_bytes() -> tuple[int, int]:
    """The bytes that this process has read and written, page cache included."""
    lines = Path("/proc/self/io").read_text().split()
    return int(lines[1]), int(lines[3])


def copy_seconds(state: Any) -> float:
    """How long a copy of all arrays to host memory takes."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    start = time.perf_counter()
    copies = [np.array(leaf) for leaf in leaves]
    seconds = time.perf_counter() - start
    del copies
    return seconds


def measure(layers: int, saves: int) -> dict[str, float]:
    model = lj.presets.SMOLLM2_135M.replace(num_hidden_layers=layers)
    config = OptimizerConfig()
    state = jax.block_until_ready(create_state(model, make_optimizer(config, make_schedule(config, 10)), 0))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x, state), donate_argnums=0)
    rows: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Checkpoints(folder, CheckpointConfig(keep=1), model=model) as checkpoints,
    ):
        for number in range(1, saves + 2):
            copy, before, start = copy_seconds(state), process_bytes(), time.perf_counter()
            checkpoints.save(number, state, {})
            returned = time.perf_counter()
            state = jax.block_until_ready(step(state))
            checkpoints.wait()
            committed, after = time.perf_counter(), process_bytes()
            rows.append(
                {
                    "copy_seconds": copy,
                    "foreground_seconds": returned - start,
                    "committed_seconds": committed - start,
                    "read_gb": (after[0] - before[0]) / 1e9,
                    "written_gb": (after[1] - before[1]) / 1e9,
                }
            )
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state) if hasattr(leaf, "nbytes"))
        del state
        before, start = process_bytes(), time.perf_counter()
        restored = checkpoints.restore(abstract)
        seconds, after = time.perf_counter() - start, process_bytes()
        assert restored is not None
    # The first save compiles.
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    restore = {"restore_seconds": seconds, "restore_read_gb": (after[0] - before[0]) / 1e9}
    return (
        {"state_gb": nbytes / 1e9, "first_foreground_seconds": rows[0]["foreground_seconds"]}
        | medians
        | restore
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of a model as wide as SmolLM2-135M")
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {name: round(value, 3) for name, value in measure(arguments.layers, arguments.saves).items()}
    print(json.dumps(found) if arguments.json else "\n".join(f"{k:26} {v}" for k, v in found.items()))


if __name__ == "__main__":
    main()
