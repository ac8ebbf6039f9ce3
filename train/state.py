"""Everything that a step changes and a checkpoint must hold."""

from __future__ import annotations

import contextlib
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from llama_jax import LlamaConfig, init


@chex.dataclass(frozen=True, mappable_dataclass=False)
class TrainState:
    """The state of a run after some steps.

    Attributes:
      step: int32 [], steps taken, skipped ones too.
      params: f32 parameter tree.
      opt_state: optax's, its moments laid out as the parameters are.
      key: the run's random key; each use folds in the step.
      skipped: int32 [], steps that were skipped as not finite.
      bad_run: int32 [], how many of them are the latest in a row.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    skipped: jax.Array
    bad_run: jax.Array


def create_state(
    model: LlamaConfig, optimizer: optax.GradientTransformation, seed: int, params: Any = None
) -> TrainState:
    """The state before the first step, made directly into the shards of the current mesh.

    Args:
      model: the model.
      optimizer: whose state to begin.
      seed: of the initial weights.
      params: weights to start from instead, f32, laid out already.
    """
    key = jax.random.key(seed)
    params = init(model, key) if params is None else params
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.jit(optimizer.init)(params),
        key=jax.random.fold_in(key, 1),
        skipped=jnp.zeros((), jnp.int32),
        bad_run=jnp.zeros((), jnp.int32),
    )


def abstract_state(
    model: LlamaConfig, optimizer: optax.GradientTransformation, mesh: Mesh | None
) -> TrainState:
    """`create_state`'s shapes, dtypes and layouts over `mesh`, without computing anything.

    The mesh may be of devices that are not here.
    """
    with on(mesh):
        shapes = jax.eval_shape(lambda: create_state(model, optimizer, 0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_layout(x, mesh)), shapes)


def _layout(x: Any, mesh: Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    spec = getattr(x.sharding, "spec", None)  # eval_shape knows the abstract mesh alone
    return NamedSharding(mesh, P() if spec is None else spec)


def on(mesh: Mesh | None) -> Any:
    """The context in which a step runs: `mesh` if there is one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
