"""Learning-rate schedules, and optimizers by name, from optax."""

from __future__ import annotations

import fnmatch
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from llama_jax.errors import ConfigError

from .config.run import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step, from 0: linear warm-up, then what `config.schedule` says.

    Args:
      config: the section of the run's configuration.
      steps: how many the run has, which the schedule spans unless `config.schedule_steps` says otherwise.
    """
    peak, steps = config.learning_rate, config.schedule_steps or steps
    warmup = min(config.warmup_steps, steps)
    # Step 0 would do nothing at a rate of 0: the ramp's first value is peak / warmup.
    ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    left = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, left, alpha=config.min_lr_ratio)
    elif config.schedule == "wsd":
        decay = min(max(round(steps * config.decay_fraction), 1), left)
        fall = optax.linear_schedule(peak, peak * config.min_lr_ratio, decay)
        after = optax.join_schedules([optax.constant_schedule(peak), fall], [left - decay])
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The update rule without clipping, which the step does together with averaging.

    Frozen parameters have no moments and get no update.

    Raises:
      ConfigError: when it is first handed parameters none of which a pattern of `freeze` matches.
    """
    rule = _rule(config, schedule)
    if config.layer_decay != 1:
        rule = optax.chain(rule, _scale_by_layer(config.layer_decay))
    if not config.freeze:
        return rule

    def kinds(params: Any) -> Any:
        return jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen(config, params))

    return optax.partition({"trained": rule, "frozen": optax.set_to_zero()}, kinds)


def frozen(config: OptimizerConfig, params: Any) -> Any:
    """Which leaves `config.freeze` keeps as they are: bool for each.

    Raises:
      ConfigError: for a pattern that matches none, naming them, or patterns that match all.
    """
    names = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path, simple=True, separator="."), params
    )
    every = jax.tree.leaves(names)
    for pattern in config.freeze:
        if not fnmatch.filter(every, pattern):
            known = ", ".join(dict.fromkeys(every))
            raise ConfigError(f"optimizer.freeze: {pattern!r} matches no parameter (they are {known})")
    chosen = jax.tree.map(lambda name: any(fnmatch.fnmatch(name, p) for p in config.freeze), names)
    if all(jax.tree.leaves(chosen)):
        raise ConfigError(f"optimizer.freeze {list(config.freeze)} leaves nothing to train; freeze less")
    return chosen


def _scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Updates of layer l of L times decay^(L - 1 - l), of the embedding times decay^L."""

    def scale(updates: Any, params: Any = None) -> Any:
        del params
        count = jax.tree.leaves(updates["layers"])[0].shape[0]

        def one(path: Any, update: jax.Array) -> jax.Array:
            if path[0].key == "embed":
                return update * decay**count
            if path[0].key != "layers":
                return update
            rates = decay ** jnp.arange(count - 1, -1, -1, dtype=jnp.float32)
            return update * rates.reshape(-1, *(1,) * (update.ndim - 1))

        return jax.tree_util.tree_map_with_path(one, updates)

    return optax.stateless(scale)


def _rule(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    c = config
    if c.name == "adamw":
        return optax.adamw(schedule, b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=decayed)
    if c.name == "lion":
        return optax.lion(schedule, b1=c.b1, b2=c.b2, weight_decay=c.weight_decay, mask=decayed)
    if c.name == "adafactor":
        # Optax decays by this rate itself, not by rate x learning rate; and its own clipping and scaling by
        # parameter size stay on: they are what the paper (arXiv 1804.04235) calls Adafactor.
        return optax.chain(
            optax.adafactor(None, weight_decay_rate=None),
            optax.add_decayed_weights(-c.weight_decay, mask=decayed),
            optax.scale_by_schedule(schedule),
        )
    muon = contrib.muon(
        1.0,
        beta=c.b2,
        eps=c.eps,
        adam_b1=c.b1,
        adam_b2=c.b2,
        # AdamW's learning rates then suit Muon too (arXiv 2502.16982, section 2.2).
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )
    # Optax's own decay of what AdamW updates would take the norm scales in.
    decay = optax.add_decayed_weights(-c.weight_decay, mask=decayed)
    return optax.chain(muon, decay, optax.scale_by_schedule(schedule))


def decayed(params: Any) -> Any:
    """Which leaves weight decay is for: all but norm scales and biases."""

    def one(path: Any, _: jax.Array) -> bool:
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(one, params)


def _matrices(params: Any) -> Any:
    """Which axes of each leaf are a matrix's input and output; None for what AdamW updates.

    Hidden layers' matrices are Muon's; embedding, output projection and norms are not (Keller Jordan's
    "Muon", 2024). The leading axis of layer leaves is a batch of matrices.
    """
    numbers = contrib.MuonDimensionNumbers
    by_name = {
        "wq": numbers(1, (2, 3)),
        "wk": numbers(1, (2, 3)),
        "wv": numbers(1, (2, 3)),
        "wo": numbers((1, 2), 3),
        "w_gate": numbers(1, 2),
        "w_up": numbers(1, 2),
        "w_down": numbers(1, 2),
    }
    return jax.tree_util.tree_map_with_path(lambda path, _: by_name.get(path[-1].key), params)
