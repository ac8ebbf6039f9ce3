"""What the processes of `test_reading.py` run: each loads its shards, and prints how much it read."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import llama_jax as lj
from llama_jax.errors import CheckpointError
from llama_jax.meshes import make_mesh
from llama_jax.train.checkpoints import orbax_manager
from llama_jax.train.checkpoints.checkpoints import Checkpoints
from llama_jax.train.config.checkpoint import CheckpointConfig
from llama_jax.weights import digests, load_params, open_source
from tests.train.small_runs import abstract_state, make_state

# Large enough that arrays outweigh metadata, in files that are not hashed by their manifest.
WIDE = lj.LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
)
MESH = "fsdp=4"


def wide_run(folder: Path, **config: Any) -> Checkpoints:
    orbax_manager.CHUNK_BYTES = 1 << 16  # as if the arrays were large
    return Checkpoints(folder, CheckpointConfig(every=1, keep=100, **config), model=WIDE)


def read_as_one_of_two(arguments: Sequence[str]) -> int:
    """Prints the bytes read for each of: an HF directory, the step of one process, and one of these two."""
    hf, run, both, damaged, address, index = (*map(Path, arguments[:4]), arguments[4], int(arguments[5]))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, index)
    mesh = make_mesh(MESH)
    abstract = abstract_state(mesh, WIDE)
    counts: dict[str, int] = {}

    def count(name: str, read: Callable[[], Any]) -> Any:
        read()  # compiles
        before = bytes_read()
        found = read()
        counts[name] = bytes_read() - before
        return found

    params = count("hf", lambda: load_params(open_source(hf), mesh=mesh))
    counts["sum"] = checksum(params)
    params = count("run", lambda: load_params(open_source(run), mesh=mesh))
    counts["run sum"] = checksum(params)
    with wide_run(run) as checkpoints:
        restored = count("state", lambda: checkpoints.restore(abstract))
    assert restored.step == 1
    with wide_run(both) as checkpoints:
        checkpoints.save(1, make_state(mesh, 1, config=WIDE), {})
        checkpoints.wait()
        restored = count("again", lambda: checkpoints.restore(abstract))
    assert restored.data_states == [{}, {}]
    try:
        with wide_run(damaged) as checkpoints:
            checkpoints.restore(abstract)
    except CheckpointError as error:
        print(json.dumps(counts | {"error": str(error)}))
    return 0


def bytes_read() -> int:
    """The bytes that this process has read, from files and the page cache."""
    return int(Path("/proc/self/io").read_text().split()[1])


def checksum(tree: Any) -> int:
    """A sum over the digests of a tree, the same over any mesh."""
    return sum(int(digests.text(digest), 16) for digest in digests.start(tree).values()) % 2**53


def local_checksum(params: Any) -> int:
    """The same, of arrays on one device."""
    return checksum(jax.tree.map(jax.numpy.asarray, jax.tree.map(np.asarray, params)))
