"""The training step: state and batch in, state and metrics out; jitted, donated, sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from llama_jax import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.loss import Loss
from llama_jax.sharding import TOKENS_BT, explicit_axes

from .config.run import RunConfig
from .feed import batch_arrays
from .objectives.objective import Batch, Objective, make_objective
from .optimizer import make_optimizer, make_schedule
from .state import FULL, TrainState, abstract_begin
from .trainable import Frozen, Tuning


@chex.dataclass(frozen=True, mappable_dataclass=False)
class StepMetrics:
    """What one step tells, all of it [].

    Attributes:
      loss: f32, nats a token.
      tokens: f32, how many predictions counted.
      grad_norm: f32, global norm before clipping.
      learning_rate: f32.
      skipped: int32, skipped steps so far.
      bad_run: int32, skipped steps in a row up to this one.
    """

    loss: jax.Array
    tokens: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array
    bad_run: jax.Array


# (state, batch, what is frozen beside it) -> (state, metrics)
Step = Callable[..., tuple[TrainState, StepMetrics]]


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 1.0,
    automatic: bool = False,
    tuning: Tuning = FULL,
    noisy: bool = False,
    ema_decay: float = 0.0,
) -> Step:
    """Makes the (not yet jitted) step.

    A step whose loss or gradient is not finite changes nothing but the counters.

    Args:
      objective: parameters and batch to a `Loss`.
      optimizer: the update rule.
      schedule: for the metrics; the optimizer holds it too.
      gradient_accumulation_steps: microbatches. Losses are summed over all of them before dividing, so that tokens weigh
        the same wherever padding falls.
      max_grad_norm: global norm to clip to; 0 is off.
      automatic: leave the layout of the optimizer's own products to the compiler (Muon, Adafactor).
      tuning: what of the model the state's parameters are.
      noisy: whether the objective is handed a key, another one each step.
      ema_decay: of the running average, where the state has one.
    """
    whole = tuning.over(objective)

    def gradient(params: Any, batch: Batch, frozen: Frozen, key: jax.Array) -> tuple[Loss, Any]:
        extras = {"key": key} if noisy else {}

        def total(params: Any) -> tuple[jax.Array, Loss]:
            loss = whole(params, frozen, batch, **extras)
            return loss.total, loss

        (_, loss), grads = jax.value_and_grad(total, has_aux=True)(params)
        return loss, grads

    def accumulated(params: Any, batch: Batch, frozen: Frozen, key: jax.Array) -> tuple[Loss, Any]:
        if gradient_accumulation_steps == 1:
            return gradient(params, batch, frozen, key)

        def one(sums: Any, turn: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, gradient(params, turn[0], frozen, turn[1])), None

        zero = jnp.zeros((), jnp.float32)
        start = (Loss(total=zero, count=zero), jax.tree.map(jnp.zeros_like, params))
        cut = {name: _microbatches(x, gradient_accumulation_steps) for name, x in batch.items()}
        return jax.lax.scan(one, start, (cut, jax.random.split(key, gradient_accumulation_steps)))[0]

    def apply(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def averaged(params: Any, state: TrainState) -> Any:
        """The running average with one step more."""
        taken = (state.step - state.skipped).astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + taken) / (10 + taken))
        return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.params, params)

    def step(state: TrainState, batch: Batch, frozen: Frozen = None) -> tuple[TrainState, StepMetrics]:
        moved = state.params if state.moved is None else state.moved
        loss, grads = accumulated(moved, batch, frozen, jax.random.fold_in(state.key, state.step))
        count = jnp.maximum(loss.count, 1.0)
        norm = optax.tree.norm(grads) / count
        scale = 1 / count
        if max_grad_norm:
            scale *= jnp.minimum(1.0, max_grad_norm / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda g: g * scale, grads)
        update = _in_automatic_mode(apply, state) if automatic and explicit_axes() else apply
        params, opt_state = update(grads, state.opt_state, moved)
        good = jnp.isfinite(loss.total) & jnp.isfinite(norm)
        choose = lambda new, old: jnp.where(good, new, old)  # noqa: E731
        new = TrainState(
            step=state.step + 1,
            params=jax.tree.map(
                choose, params if state.moved is None else averaged(params, state), state.params
            ),
            opt_state=jax.tree.map(choose, opt_state, state.opt_state),
            key=state.key,
            skipped=state.skipped + ~good,
            bad_run=jnp.where(good, 0, state.bad_run + 1),
            moved=None if state.moved is None else jax.tree.map(choose, params, moved),
        )
        metrics = StepMetrics(
            loss=loss.mean,
            tokens=loss.count,
            grad_norm=norm,
            # The optimizer counts the steps it took, and a skipped one is none.
            learning_rate=jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            skipped=new.skipped,
            bad_run=new.bad_run,
        )
        return new, metrics

    return step


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """[B, T] -> [count, B / count, T]; microbatch m has rows m, m + count, ...: no row changes device."""
    return jnp.moveaxis(x.reshape(-1, count, x.shape[-1]), 1, 0)


def _in_automatic_mode(apply: Callable[..., Any], state: TrainState) -> Callable[..., Any]:
    layouts = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (state.params, state.opt_state))
    return jax.sharding.auto_axes(apply, out_sharding=layouts)


def build_step(
    run: RunConfig, model: LlamaConfig, mesh: Mesh | None, platform: str, tuning: Tuning | None = None
) -> tuple[Any, TrainState, dict[str, jax.ShapeDtypeStruct], Frozen]:
    """The jitted step of a run, and the abstract state, batch and frozen weights it takes.

    Everything is abstract: the mesh may be of devices that are not here, as when the step is compiled for
    a pod on another machine. Lower and call it within `state.on(mesh)`.

    Returns:
      The step (state, batch, frozen) -> (state, metrics), which donates the state; the state's shapes, dtypes
      and layouts; the global batch's; those of what is frozen, None where everything is trained.

    Raises:
      ConfigError: if the mesh does not divide a microbatch.
    """
    each = run.train.global_batch_size // run.train.gradient_accumulation_steps
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if each % parts:
        raise ConfigError(
            f"train.global_batch_size / train.gradient_accumulation_steps is {run.train.global_batch_size} / {run.train.gradient_accumulation_steps} = "
            f"{each}, which mesh.data x mesh.fsdp = {parts} does not divide; "
            f"make train.global_batch_size {-(-each // parts) * parts * run.train.gradient_accumulation_steps}"
        )
    schedule = make_schedule(run.optimizer, run.train.steps)
    optimizer = make_optimizer(run.optimizer, schedule)
    tuning = Tuning.of(run, platform) if tuning is None else tuning
    step = make_step(
        make_objective(run, model, platform),
        optimizer,
        schedule,
        gradient_accumulation_steps=run.train.gradient_accumulation_steps,
        max_grad_norm=run.optimizer.max_grad_norm,
        automatic=run.optimizer.name in ("muon", "adafactor"),
        tuning=tuning,
        noisy=run.train.neftune_alpha > 0,
        ema_decay=run.optimizer.ema_decay,
    )
    shape = (run.train.global_batch_size, run.train.seq_len)
    layout = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, TOKENS_BT)
    arrays = batch_arrays(run.train.objective, reference=run.preference.precompute_ref_log_probs)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in arrays.items()}
    state, frozen = abstract_begin(model, optimizer, mesh, tuning)
    return jax.jit(step, donate_argnums=0), state, batch, frozen


__all__ = ["Step", "StepMetrics", "build_step", "make_step"]
