"""The training state: everything that a step changes and a checkpoint stores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from llama_jax import LlamaConfig, init
from llama_jax.sharding import use_mesh

from .trainable import FULL_FINETUNING, Frozen, Trainable, TrainableSpec


@chex.dataclass(frozen=True, mappable_dataclass=False)
class TrainState:
    """The state of a run after some steps; checkpoints store its leaves by these names.

    Attributes:
      step: int32 [], steps so far, including skipped ones.
      params: the trainable parameters, f32: the model's, or an adapter's.
      opt_state: optax's; moments are sharded like the parameters.
      key: the run's random key; each use folds in the step.
      skipped: int32 [], steps that were skipped because loss or gradient was not finite.
      bad_run: int32 [], how many of the last steps in a row were skipped.
      moved: with an EMA, which is then `params`, the parameters that the optimizer updates; else None.
      residual: with gradients in int8, what each part of the mesh axis `data` has still to add to their sum
        (`ops.int8_sum`): like the parameters, f32, with a leading dimension that `data` shards; else None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key: jax.Array
    skipped: jax.Array
    bad_run: jax.Array
    moved: Any = None
    residual: Any = None


def create_state(
    model: LlamaConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    params: Any = None,
) -> TrainState:
    """The initial state if all weights are trained; see `init_state`."""
    return init_state(model, optimizer, seed, params)[0]


def split_params(
    model: LlamaConfig, seed: int, params: Any, trainable_spec: TrainableSpec
) -> tuple[Trainable, Frozen]:
    """The initial trainable and frozen parameters: `init_state` without an optimizer."""
    key = jax.random.key(seed)
    if params is None or "embed" not in params:
        params = {**init(model, key), **(params or {})}
    return trainable_spec.split(model, params, jax.random.fold_in(key, 2))


def init_state(
    model: LlamaConfig,
    optimizer: optax.GradientTransformation,
    seed: int,
    params: Any = None,
    trainable_spec: TrainableSpec = FULL_FINETUNING,
) -> tuple[TrainState, Frozen]:
    """Initializes the state and the frozen parameters, directly sharded over the current mesh.

    Args:
      model: the model's configuration.
      optimizer: the optimizer.
      seed: of the random initial weights.
      params: pretrained weights to start from instead, f32, already sharded.
      trainable_spec: which parameters are trained.
    """
    trainable, frozen = split_params(model, seed, params, trainable_spec)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=trainable,
        opt_state=jax.jit(optimizer.init)(trainable),
        key=jax.random.fold_in(jax.random.key(seed), 1),
        skipped=jnp.zeros((), jnp.int32),
        bad_run=jnp.zeros((), jnp.int32),
        moved=jax.tree.map(jnp.copy, trainable) if trainable_spec.uses_ema else None,
    )
    return state, frozen


def with_ema(state: TrainState, uses_ema: bool) -> TrainState:
    """Returns a state with or without an EMA, concrete or abstract.

    An EMA that is begun starts at the present parameters; where one is ended, training goes on from the
    parameters that the optimizer updates.
    """
    if uses_ema == (state.moved is not None):
        return state
    if not uses_ema:
        return state.replace(params=state.moved, moved=None)  # type: ignore[attr-defined]
    is_abstract = isinstance(jax.tree.leaves(state.params)[0], jax.ShapeDtypeStruct)
    moved = state.params if is_abstract else jax.tree.map(jnp.copy, state.params)
    return state.replace(moved=moved)  # type: ignore[attr-defined]


def residual_parts(state: TrainState) -> int:
    """The number of parts of `data` that a state's residual has; 0 without one."""
    return 0 if state.residual is None else jax.tree.leaves(state.residual)[0].shape[0]


def with_residual(state: TrainState, parts: int, mesh: Mesh | None) -> TrainState:
    """Returns a state with the residual of `parts` parts of `data`, or none for 0; concrete or abstract.

    A residual that is begun is zero. Where there are more or fewer parts, each gets an equal share of the
    sum, which is all that has still to be added to the gradients.
    """
    found = residual_parts(state)
    if parts == found:
        return state
    if not parts:
        return state.replace(residual=None)  # type: ignore[attr-defined]
    layout = jax.tree.map(lambda x: _over_data(x, parts, mesh), state.params)
    if isinstance(jax.tree.leaves(state.params)[0], jax.ShapeDtypeStruct):
        return state.replace(residual=layout)  # type: ignore[attr-defined]

    def share(x: jax.ShapeDtypeStruct, old: jax.Array) -> jax.Array:
        return jax.sharding.reshard(jnp.broadcast_to(old.sum(0) / parts, x.shape), x.sharding.spec)

    if found:
        with use_mesh(mesh):
            residual = jax.jit(partial(jax.tree.map, share, layout))(state.residual)
    else:
        residual = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), layout)
    return state.replace(residual=residual)  # type: ignore[attr-defined]


def _over_data(x: Any, parts: int, mesh: Mesh | None) -> jax.ShapeDtypeStruct:
    """A leaf of the residual for a parameter; its parts are whole on each device where `data` has others."""
    assert mesh is not None  # has the axis
    data = "data" if mesh.shape["data"] == parts else None
    sharding = NamedSharding(mesh, P(data, *x.sharding.spec))
    return jax.ShapeDtypeStruct((parts, *x.shape), jnp.float32, sharding=sharding)


def abstract_state(
    model: LlamaConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
    trainable_spec: TrainableSpec = FULL_FINETUNING,
) -> tuple[TrainState, Frozen]:
    """`abstract` of `init_state`'s result."""
    return abstract(lambda: init_state(model, optimizer, 0, trainable_spec=trainable_spec), mesh)


def abstract(make: Callable[[], Any], mesh: Mesh | None) -> Any:
    """Shapes, dtypes and shardings of what `make` returns over `mesh`, without computing anything.

    The mesh may consist of devices of another machine.
    """
    with use_mesh(mesh):
        shapes = jax.eval_shape(make)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding(x, mesh)), shapes)


def _sharding(x: Any, mesh: Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    spec = getattr(x.sharding, "spec", None)  # eval_shape's sharding is over the abstract mesh
    return NamedSharding(mesh, P() if spec is None else spec)
