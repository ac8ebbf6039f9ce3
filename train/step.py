"""The training step (state, batch) -> (state, metrics): jitted, sharded, with the state donated."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, SingleDeviceSharding

from llama_jax import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.loss import Loss
from llama_jax.ops.gradient_sums import Maximum, added, sum_over_data, sum_over_data_in_int8
from llama_jax.ops.router_losses import RouterLosses
from llama_jax.sharding import TOKENS_BT, batch_axes, batch_parts, explicit_axes, named

from .config.objective import RL_OBJECTIVES
from .config.run import RunConfig
from .feed import batch_dtypes
from .objectives import make_loss_fn
from .objectives.common import Batch, LossFn
from .objectives.policy import PolicyLoss, empty_metrics, metric_names
from .optimizer import make_optimizer, make_schedule
from .state import TrainState, abstract, abstract_state, with_residual
from .teacher import random_teacher, teacher_config
from .trainable import FULL_FINETUNING, Frozen, TrainableSpec
from .value_model import value_config


@chex.dataclass(frozen=True, mappable_dataclass=False)
class StepMetrics:
    """The metrics of a step, all of shape [].

    Attributes:
      loss: f32, nats per token; of other objectives, their loss per example or pair.
      tokens: f32, number of predictions (examples, pairs) in the loss.
      grad_norm: f32, global norm before clipping.
      learning_rate: f32.
      skipped: int32, skipped steps so far.
      bad_run: int32, consecutive skipped steps up to this one.
      router: the auxiliary losses of a mixture's routers; None where the loss has none.
      policy: sums and maxima over the batch, by `metric_names`; None for other objectives.
    """

    loss: jax.Array
    tokens: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array
    bad_run: jax.Array
    router: RouterLosses | None = None
    policy: Mapping[str, jax.Array | Maximum] | None = None


# (state, batch, frozen parameters) -> (state, metrics)
Step = Callable[..., tuple[TrainState, StepMetrics]]


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float = 1.0,
    auto_sharding: bool = False,
    trainable_spec: TrainableSpec = FULL_FINETUNING,
    needs_key: bool = False,
    ema_decay: float = 0.0,
    gradient_dtype: jax.typing.DTypeLike = jnp.float32,
    has_router_losses: bool = False,
    policy_metrics: Sequence[str] = (),
) -> Step:
    """Makes the step, not yet jitted.

    A step whose loss or gradient is not finite is skipped: it changes nothing but the counters.

    Args:
      loss_fn: (params, batch) -> `Loss`.
      optimizer: the optimizer, without gradient clipping.
      schedule: the optimizer's learning-rate schedule, for the metrics.
      gradient_accumulation_steps: number of microbatches. Their loss sums are added before dividing by the
        total count, so that every token has the same weight however padding is distributed.
      max_grad_norm: global norm to clip gradients to; 0 is off.
      auto_sharding: let the compiler choose the shardings within the optimizer's update (Muon, Adafactor).
      trainable_spec: which parameters are trained.
      needs_key: whether loss_fn takes a random `key`, a different one in each step.
      ema_decay: decay of the EMA of the parameters, if the state has one.
      gradient_dtype: in which gradients are summed over the mesh axis `data`, once a step; of a state with a
        residual they are in int8.
      has_router_losses: whether the loss has those of a mixture's routers.
      policy_metrics: `metric_names` of a `PolicyLoss`; empty for other losses.
    """
    split_loss_fn = trainable_spec.wrap(loss_fn)

    def value_and_grad(params: Any, batch: Batch, frozen: Frozen, key: jax.Array) -> tuple[Loss, Any]:
        kwargs = {"key": key} if needs_key else {}

        def total(params: Any) -> tuple[jax.Array, Loss]:
            loss = split_loss_fn(params, frozen, batch, **kwargs)
            return loss.total, loss

        (_, loss), grads = jax.value_and_grad(total, has_aux=True)(params)
        return loss, grads

    def accumulate(params: Any, batch: Batch, frozen: Frozen, key: jax.Array) -> tuple[Loss, Any]:
        """Loss and gradient summed over the microbatches."""
        if gradient_accumulation_steps == 1:
            return value_and_grad(params, batch, frozen, key)

        def add_microbatch(sums: Any, microbatch: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            rows, microbatch_key = microbatch
            return added(sums, value_and_grad(params, rows, frozen, microbatch_key)), None

        zero = jnp.zeros((), jnp.float32)
        router = RouterLosses(balance=zero, z=zero) if has_router_losses else None
        empty = Loss(total=zero, count=zero, router=router)
        if policy_metrics:
            empty = PolicyLoss(total=zero, count=zero, metrics=empty_metrics(policy_metrics))
        zeros = (empty, jax.tree.map(jnp.zeros_like, params))
        batches = {name: _microbatches(x, gradient_accumulation_steps) for name, x in batch.items()}
        keys = jax.random.split(key, gradient_accumulation_steps)
        return jax.lax.scan(add_microbatch, zeros, (batches, keys))[0]

    def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def update_ema(params: Any, state: TrainState) -> Any:
        updates = (state.step - state.skipped).astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + updates) / (10 + updates))
        return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.params, params)

    def step(state: TrainState, batch: Batch, frozen: Frozen = None) -> tuple[TrainState, StepMetrics]:
        old_params = state.params if state.moved is None else state.moved
        key = jax.random.fold_in(state.key, state.step)
        residual, arguments = state.residual, (old_params, batch, frozen, key)
        if residual is None:
            loss, grads = sum_over_data(accumulate, gradient_dtype)(*arguments)
        else:
            loss, grads, residual = sum_over_data_in_int8(accumulate, _divisor)(residual, *arguments)
        count = _divisor(loss)
        norm = optax.tree.norm(grads) / count
        scale = 1 / count
        if max_grad_norm:
            scale *= jnp.minimum(1.0, max_grad_norm / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda g: g * scale, grads)
        update_fn = _with_auto_sharding(update, state) if auto_sharding and explicit_axes() else update
        params, opt_state = update_fn(grads, state.opt_state, old_params)
        finite = jnp.isfinite(loss.total) & jnp.isfinite(norm)
        select = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
        new_state = TrainState(
            step=state.step + 1,
            params=jax.tree.map(
                select, params if state.moved is None else update_ema(params, state), state.params
            ),
            opt_state=jax.tree.map(select, opt_state, state.opt_state),
            key=state.key,
            skipped=state.skipped + ~finite,
            bad_run=jnp.where(finite, 0, state.bad_run + 1),
            moved=None if state.moved is None else jax.tree.map(select, params, old_params),
            residual=jax.tree.map(select, residual, state.residual),
        )
        metrics = StepMetrics(
            loss=loss.mean,
            tokens=loss.count,
            grad_norm=norm,
            # The optimizer's own step count excludes skipped steps.
            learning_rate=jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            skipped=new_state.skipped,
            bad_run=new_state.bad_run,
            router=jax.tree.map(lambda x: x / count, loss.router),
            policy=getattr(loss, "metrics", None),
        )
        return new_state, metrics

    return step


def _divisor(loss: Loss) -> jax.Array:
    """What makes a mean of the sums over all tokens."""
    return jnp.maximum(loss.count, 1.0)


def _microbatches(x: jax.Array, count: int) -> jax.Array:
    """[B, T] -> [count, B / count, T]; microbatch m has rows m, m + count, ...: no row changes device."""
    return jnp.moveaxis(x.reshape(-1, count, x.shape[-1]), 1, 0)


def _with_auto_sharding(update: Callable[..., Any], state: TrainState) -> Callable[..., Any]:
    """Runs an update with automatic axes; its results have the shardings of the state."""
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (state.params, state.opt_state))
    return jax.sharding.auto_axes(update, out_sharding=specs)


def build_step(
    run: RunConfig,
    model: LlamaConfig,
    mesh: Mesh | None,
    platform: str,
    trainable_spec: TrainableSpec | None = None,
    teacher: LlamaConfig | None = None,
) -> tuple[Any, TrainState, dict[str, jax.ShapeDtypeStruct], Frozen]:
    """The jitted step of a run, and the abstract state, batch and frozen parameters to lower it with.

    Everything is abstract: the mesh may consist of devices of another machine, as when the step is compiled
    for a pod. Lower and call it within `use_mesh(mesh)`.

    Args:
      run, model, mesh, platform: of the run.
      trainable_spec: which parameters are trained; None: as the run says.
      teacher: the configuration of its teacher; None: as the run says.

    Returns:
      The step (state, batch, frozen) -> (state, metrics), which donates the state; shapes, dtypes and
      shardings of the state, of the global batch, and of the frozen parameters (None if all are trained).

    Raises:
      ConfigError: if the mesh does not divide a microbatch, or `data` is 1 and sums over it have a dtype.
    """
    accumulation_steps = run.train.gradient_accumulation_steps
    rows = run.train.global_batch_size // accumulation_steps
    shards = 1 if mesh is None else batch_parts(mesh.shape)
    if mesh is not None and rows % shards:
        raise ConfigError(
            "train.global_batch_size / train.gradient_accumulation_steps is "
            f"{run.train.global_batch_size} / {accumulation_steps} = {rows}, which "
            f"{batch_axes(mesh.shape, 'mesh.')} = {shards} does not divide; set train.global_batch_size to "
            f"{-(-rows // shards) * shards * accumulation_steps}"
        )
    parts = run.mesh.residual_parts(1 if mesh is None else mesh.shape.get("data", 1))
    schedule = make_schedule(run.optimizer, run.train.steps)
    optimizer = make_optimizer(run.optimizer, schedule)
    if trainable_spec is None:
        trainable_spec = TrainableSpec.from_config(run, platform, value_model=value_config(run))
    step = make_step(
        make_loss_fn(run, model, platform, packed=not run.samples),
        optimizer,
        schedule,
        gradient_accumulation_steps=accumulation_steps,
        max_grad_norm=run.optimizer.max_grad_norm,
        auto_sharding=run.optimizer.name in ("muon", "adafactor"),
        trainable_spec=trainable_spec,
        needs_key=run.train.neftune_alpha > 0 or run.train.stochastic_rounding,
        ema_decay=run.optimizer.ema_decay,
        gradient_dtype=jnp.float32 if parts else jnp.dtype(run.mesh.gradient_dtype),
        has_router_losses=bool(model.num_experts) and run.train.objective not in ("distill", *RL_OBJECTIVES),
        policy_metrics=metric_names(run),
    )
    shape = (run.train.global_batch_size, run.train.seq_len)
    layout = SingleDeviceSharding(jax.devices()[0]) if mesh is None else named(mesh, TOKENS_BT)
    dtypes = batch_dtypes(
        run.data_objective,
        reference=run.preference.precompute_ref_log_probs,
        logprobs=run.logprob_arrays,
    )
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in dtypes.items()}
    state, frozen = abstract_state(model, optimizer, mesh, trainable_spec)
    if (teacher := teacher or teacher_config(run)) is not None:
        frozen = {
            **(frozen or {}),
            "teacher": abstract(functools.partial(random_teacher, run, teacher, platform), mesh),
        }
    state = with_residual(state, parts, mesh)
    return jax.jit(step, donate_argnums=0), state, batch, frozen
