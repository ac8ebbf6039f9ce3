"""Everything that a step changes and a checkpoint must hold."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from llama_jax import LlamaConfig, init
from llama_jax.sharding import use_mesh

from .trainable import Frozen, Trainable, Tuning

FULL = Tuning()  # every weight is trained


@chex.dataclass(frozen=True, mappable_dataclass=False)
class TrainState:
    """The state of a run after some steps.

    Attributes:
      step: int32 [], steps taken, skipped ones too.
      params: what is trained, f32: the parameter tree, or an adapter.
      opt_state: optax's, its moments laid out as the parameters are.
      key: the run's random key; each use folds in the step.
      skipped: int32 [], steps that were skipped as not finite.
      bad_run: int32 [], how many of them are the latest in a row.
      moved: where `params` is a running average, the weights that the optimizer moves; else None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    skipped: jax.Array
    bad_run: jax.Array
    moved: Any = None


def create_state(
    model: LlamaConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    params: Any = None,
) -> TrainState:
    """The state before the first step where every weight is trained; see `begin`."""
    return begin(model, optimizer, seed, params)[0]


def take_apart(model: LlamaConfig, seed: int, params: Any, tuning: Tuning) -> tuple[Trainable, Frozen]:
    """What is trained and what is frozen at the beginning of a run; as `begin`, without an optimizer."""
    key = jax.random.key(seed)
    params = init(model, key) if params is None else params
    return tuning.begin(model, params, jax.random.fold_in(key, 2))


def begin(
    model: LlamaConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    params: Any = None,
    tuning: Tuning = FULL,
) -> tuple[TrainState, Frozen]:
    """The state before the first step and what is frozen, made directly into the current mesh's shards.

    Args:
      model: the model.
      optimizer: whose state to begin.
      seed: of the initial weights.
      params: weights to start from instead, f32, laid out already.
      tuning: what of them is trained.
    """
    trainable, frozen = take_apart(model, seed, params, tuning)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trainable,
        opt_state=jax.jit(optimizer.init)(trainable),
        key=jax.random.fold_in(jax.random.key(seed), 1),
        skipped=jnp.zeros((), jnp.int32),
        bad_run=jnp.zeros((), jnp.int32),
        moved=jax.tree.map(jnp.copy, trainable) if tuning.averaged else None,
    )
    return state, frozen


def abstract_begin(
    model: LlamaConfig, optimizer: optax.GradientTransformation, mesh: Mesh | None, tuning: Tuning = FULL
) -> tuple[TrainState, Frozen]:
    """`begin`'s shapes, dtypes and layouts over `mesh`, without computing anything.

    The mesh may be of devices that are not here.
    """
    with use_mesh(mesh):
        shapes = jax.eval_shape(lambda: begin(model, optimizer, 0, tuning=tuning))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_layout(x, mesh)), shapes)


def _layout(x: Any, mesh: Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    spec = getattr(x.sharding, "spec", None)  # eval_shape knows the abstract mesh alone
    return NamedSharding(mesh, P() if spec is None else spec)
