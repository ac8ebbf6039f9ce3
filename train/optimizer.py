"""Learning-rate schedules and optimizers, built from optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from llama_jax.sharding import BIASES

from .config.optimizer import OptimizerConfig
from .trainable import frozen_mask


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step, from 0: linear warmup, then `config.schedule`.

    Args:
      config: the `optimizer` section.
      steps: the run's number of steps: the length of the schedule unless `config.schedule_steps` is set.
    """
    peak, steps = config.learning_rate, config.schedule_steps or steps
    warmup = min(config.warmup_steps, steps)
    # Step 0 would be lost at a learning rate of 0: warmup starts at peak / warmup.
    ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    remaining = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, remaining, alpha=config.min_lr_ratio)
    elif config.schedule == "wsd":
        decay = min(max(round(steps * config.decay_fraction), 1), remaining)
        decay_schedule = optax.linear_schedule(peak, peak * config.min_lr_ratio, decay)
        after = optax.join_schedules([optax.constant_schedule(peak), decay_schedule], [remaining - decay])
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer without gradient clipping, which the step does together with averaging.

    Frozen parameters have no moments and get no update.

    Raises:
      ConfigError: at initialization, if a pattern of `freeze` matches no parameter.
    """
    transform = _optimizer(config, schedule)
    if config.freeze:
        transform = _without_frozen(transform, config)
    return transform if config.layer_decay == 1 else _scaled_by_layer(transform, config.layer_decay)


def _without_frozen(
    transform: optax.GradientTransformation, config: OptimizerConfig
) -> optax.GradientTransformation:
    """Applies `transform` to the parameters that are not frozen; the others get no update.

    The state has the leaves that it has without frozen parameters, but for theirs: a resumed run may freeze
    others.
    """

    def without(tree: Any, mask: Any) -> Any:
        return jax.tree.map(lambda x, is_frozen: optax.MaskedNode() if is_frozen else x, tree, mask)

    def init(params: Any) -> Any:
        return transform.init(without(params, frozen_mask(config, params)))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        mask = frozen_mask(config, updates)
        params = None if params is None else without(params, mask)
        new, state = transform.update(without(updates, mask), state, params)
        zeros = jax.tree.map(jnp.zeros_like, updates)
        new = jax.tree.map(
            lambda zero, update: zero if isinstance(update, optax.MaskedNode) else update, zeros, new
        )
        return new, state

    return optax.GradientTransformation(init, update)


def _scaled_by_layer(transform: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Scales the updates of layer l of L by decay^(L - 1 - l), of the embedding by decay^L.

    The state is that of `transform`, so that a resumed run may change the decay.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = transform.update(updates, state, params)
        count = jax.tree.leaves(updates["layers"])[0].shape[0]

        def scale_leaf(path: Any, update: jax.Array) -> jax.Array:
            if path[0].key == "embed":
                return update * decay**count
            if path[0].key != "layers":
                return update
            factors = decay ** jnp.arange(count - 1, -1, -1, dtype=jnp.float32)
            return update * factors.reshape(-1, *(1,) * (update.ndim - 1))

        return jax.tree_util.tree_map_with_path(scale_leaf, updates), state

    return optax.GradientTransformation(transform.init, update)


def _optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    c = config
    if c.name == "adamw":
        return optax.adamw(
            schedule, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=weight_decay_mask
        )
    if c.name == "lion":
        return optax.lion(schedule, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=weight_decay_mask)
    if c.name == "adafactor":
        # optax.adafactor's weight decay is not multiplied by the learning rate, so it is applied here. Its
        # update clipping and parameter scaling stay on: they are part of Adafactor (arXiv 1804.04235).
        return optax.chain(
            optax.adafactor(None, weight_decay_rate=None),
            optax.add_decayed_weights(-c.weight_decay, mask=weight_decay_mask),
            optax.scale_by_schedule(schedule),
        )
    muon = contrib.muon(
        1.0,
        beta=c.b2,
        eps=c.eps,
        adam_b1=c.b1,
        adam_b2=c.b2,
        # Makes AdamW's learning rates suitable for Muon (arXiv 2502.16982, section 2.2).
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )
    # contrib.muon's own weight decay would include the norm scales, which AdamW updates.
    decay = optax.add_decayed_weights(-c.weight_decay, mask=weight_decay_mask)
    return optax.chain(muon, decay, optax.scale_by_schedule(schedule))


def weight_decay_mask(params: Any) -> Any:
    """Which leaves get weight decay: all but norm scales and biases."""

    def is_decayed(path: Any, _: jax.Array) -> bool:
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name and path[-1].key not in BIASES

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def _matrices(params: Any) -> Any:
    """Input and output axes of the matrices that Muon updates; None for leaves that AdamW updates.

    Muon is for the matrices of hidden layers, not for embedding, output projection and norms (Keller Jordan,
    "Muon", 2024). The leading axes of layer leaves, of layers and experts, are a batch of matrices. Routers
    are AdamW's.
    """
    axes = contrib.MuonDimensionNumbers
    by_name = {
        "wq": axes(1, (2, 3)),
        "wk": axes(1, (2, 3)),
        "wv": axes(1, (2, 3)),
        "wo": axes((1, 2), 3),
        "w_gate": axes(1, 2),
        "w_up": axes(1, 2),
        "w_down": axes(1, 2),
    }
    of_experts = {name: axes(2, 3) for name in ("w_gate", "w_up", "w_down")}

    def dimensions(path: Any, leaf: jax.Array) -> Any:
        name = path[-1].key
        return of_experts[name] if name in of_experts and leaf.ndim == 4 else by_name.get(name)

    return jax.tree_util.tree_map_with_path(dimensions, params)
