"""A training state of a few kilobytes and runs of it, for the tests of checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import llama_jax as lj
from llama_jax.meshes import make_mesh
from llama_jax.sharding import named, param_specs
from llama_jax.train.checkpoints.checkpoints import Checkpoints
from llama_jax.train.config.checkpoint import CheckpointConfig
from tests.tiny import CONFIG, PIECES, write_vocabulary

# All sizes are multiples of 8, so that any mesh of the 8 test devices can shard it.
MODEL = CONFIG.replace(
    vocab_size=len(PIECES) // 8 * 8, num_attention_heads=8, num_key_value_heads=8, head_dim=2
)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


@chex.dataclass(frozen=True)
class State:
    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


def one_device() -> Mesh:
    return make_mesh("", devices=jax.devices()[:1])


@functools.cache
def abstract_state(mesh: Mesh, config: lj.LlamaConfig = MODEL, optimizer: Any = OPTIMIZER) -> State:
    """The shapes, dtypes and layouts of a state on a mesh."""
    specs = param_specs(config)
    params = jax.eval_shape(lambda: lj.init(config, jax.random.key(0)))

    def with_sharding(leaf: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named(mesh, spec))

    replicated = NamedSharding(mesh, P())
    opt_state = optax.tree_map_params(
        optimizer,
        with_sharding,
        jax.eval_shape(optimizer.init, params),
        specs,
        transform_non_params=lambda leaf: with_sharding(leaf, P()),
        is_leaf=lambda leaf: isinstance(leaf, P),
    )
    return State(
        params=jax.tree.map(with_sharding, params, specs),
        opt_state=opt_state,
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated),
        key=jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=replicated),
    )


def make_state(mesh: Mesh, seed: int = 0, **kind: Any) -> State:
    """A state in which every leaf is random."""
    abstract = abstract_state(mesh, **kind)
    rng = np.random.default_rng(seed)

    def fill(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = np.array([0, seed], np.uint32)
            key = jax.make_array_from_callback(data.shape, leaf.sharding, lambda index: data[index])
            return jax.random.wrap_key_data(key)
        values = (100 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])

    return jax.tree.map(fill, abstract)


def host_leaves(state: Any) -> list[np.ndarray]:
    """Every leaf as a NumPy array, random keys as their key data."""
    leaves = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for leaf in jax.tree.leaves(state)
    ]
    return [np.array(leaf) for leaf in leaves]


def same(left: Any, right: Any) -> bool:
    """Whether two states are equal bit for bit, in structure and dtypes too."""
    return jax.tree.structure(left) == jax.tree.structure(right) and all(
        a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(host_leaves(left), host_leaves(right), strict=True)
    )


def checkpoints_of(folder: Path, warn: Callable[[str], None] = lambda _: None, **config: Any) -> Checkpoints:
    """A run's checkpoints, after every step, all kept by default."""
    return Checkpoints(folder, CheckpointConfig(**{"every": 1, "keep": 100} | config), model=MODEL, warn=warn)


def save_run(folder: Path, *steps: int, config: CheckpointConfig | None = None, **kind: Any) -> Path:
    """Saves a state for each step, seeded by it, with an eval_loss of 10 / step, and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder / "tok.bin", PIECES[: MODEL.vocab_size])
    config = config or CheckpointConfig(every=1, keep=100)
    with Checkpoints(folder, config, model=kind.get("config", MODEL), run={"data": "abc"}) as checkpoints:
        for step in steps:
            state = make_state(one_device(), step, **kind)
            checkpoints.save(step, state, {"batch": step}, {"eval_loss": 10 / step, "tokens": 1e3 * step})
    return folder
