"""What the processes of `test_local_copies.py` run: two slices of two devices each."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from llama_jax.meshes import make_mesh
from llama_jax.train.checkpoints.checkpoints import Checkpoints
from llama_jax.train.checkpoints.state_tree import named_leaves
from llama_jax.train.config.checkpoint import CheckpointConfig
from tests.train.reading_processes import checksum
from tests.train.small_runs import MODEL, abstract_state, make_state

MESH = "data=2,fsdp=2"
LAST = 5


def copies(folder: Path, index: int, warnings: list[str]) -> Checkpoints:
    config = CheckpointConfig(every=3, local_every=1, local_dir=str(folder / f"host{index}"), keep=100)
    return Checkpoints(folder / "run", config, model=MODEL, run={"data": "abc"}, warn=warnings.append)


def join(arguments: Sequence[str]) -> tuple[Path, int]:
    folder, address, index = Path(arguments[0]), arguments[1], int(arguments[2])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, index)
    return folder, index


def save_until_killed(arguments: Sequence[str]) -> int:
    """Saves checkpoints every three steps and copies after the others; waits to be killed."""
    folder, index = join(arguments)
    mesh = make_mesh(MESH)
    with copies(folder, index, []) as checkpoints:
        for step in range(1, LAST + 1):
            assert checkpoints.should_save(step)
            checkpoints.save(step, make_state(mesh, step), {"step": step, "process": index})
        checkpoints.wait()
        checkpoints._copies.wait()
        print("saved", flush=True)
        time.sleep(600)
    return 0


def restore(arguments: Sequence[str]) -> int:
    """Restores; prints step, checksum, data states and warnings."""
    folder, index = join(arguments)
    warnings: list[str] = []
    with copies(folder, index, warnings) as checkpoints:
        restored = checkpoints.restore(abstract_state(make_mesh(MESH)))
    found = {
        "step": restored.step,
        "sum": checksum(named_leaves(restored.state)),
        "data": restored.data_states,
        "run": dict(restored.run),
        "warnings": warnings,
    }
    print(json.dumps(found))
    return 0
