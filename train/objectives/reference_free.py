"""Preferences without a reference model, over packed pairs: SimPO and ORPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig
from llama_jax.loss import Loss
from llama_jax.ops.router_losses import RouterLosses

from ..config.preference import PreferenceConfig
from ..config.train import TrainConfig
from .common import (
    Batch,
    Metrics,
    MetricsFn,
    masked_sums,
    pair_ends,
    pair_metrics,
    pair_sums,
    unshard_sequence,
    with_router_losses,
)
from .preference import routed_logprobs

_LEAST_DOUBT = 1e-6  # 1 - p of an answer is not taken to be less: the odds of probability one are infinite


def simpo_loss(
    chosen: jax.Array, rejected: jax.Array, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> jax.Array:
    """Simple preference optimization (SimPO, arXiv 2405.14734, eq. 6).

    With m = beta (log p_chosen - log p_rejected) - gamma, log p averaged over an answer's tokens, and e the
    label smoothing:

        -(1 - e) log s(m) - e log s(-m)

    Args:
      chosen, rejected: f32 [P], the policy's mean log-probabilities of the answers' tokens.
      beta: scale of the rewards beta log p.
      gamma: the target margin between them.
      label_smoothing: assumed probability that a pair's labels are swapped, below 0.5.

    Returns:
      f32 [P].
    """
    margin = beta * (chosen - rejected) - gamma
    return (label_smoothing - 1) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def orpo_loss(chosen: jax.Array, rejected: jax.Array, *, beta: float) -> jax.Array:
    """Odds ratio preference optimization (ORPO, arXiv 2403.07691, eq. 6 and 7).

    With log p averaged over an answer's tokens, and odds(p) = p / (1 - p):

        -log p_chosen - beta log s(log odds(p_chosen) - log odds(p_rejected))

    Args:
      chosen, rejected: f32 [P], the policy's mean log-probabilities of the answers' tokens.
      beta: weight of the odds ratio, lambda in the paper.

    Returns:
      f32 [P].
    """
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - beta * jax.nn.log_sigmoid(log_odds_ratio)


def _log_odds(logprobs: jax.Array) -> jax.Array:
    """log p - log(1 - p) of log p; f32."""
    x = jnp.minimum(logprobs, -_LEAST_DOUBT)
    # Both forms cancel on one side of p = 1/2; x is kept from the other side in each.
    small, large = jnp.minimum(x, -jnp.log(2.0)), jnp.maximum(x, -jnp.log(2.0))
    log_complement = jnp.where(x < -jnp.log(2.0), jnp.log1p(-jnp.exp(small)), jnp.log(-jnp.expm1(large)))
    return logprobs - log_complement


def simple_preference(
    model: LlamaConfig, config: TrainConfig, platform: str, preference: PreferenceConfig
) -> MetricsFn:
    """`simpo_loss` over a batch's pairs; `Loss.count` is the number of pairs.

    The metrics are `accuracy` and `reward_margin` of the rewards beta log p, log p averaged over tokens.

    Args:
      model: the model's configuration.
      config: the `train` section.
      platform: the platform that it is compiled for, such as `tpu`.
      preference: the `preference` section.
    """
    mean_logprobs = _mean_logprobs(model, config, platform)

    def metrics_fn(params: Any, batch: Batch) -> tuple[Loss, Metrics]:
        chosen, rejected, router = mean_logprobs(params, batch)
        losses = simpo_loss(
            chosen,
            rejected,
            beta=preference.beta,
            gamma=preference.simpo_gamma,
            label_smoothing=preference.label_smoothing,
        )
        rewards = (preference.beta * chosen, preference.beta * rejected)
        loss, metrics = masked_sums(pair_ends(batch), losses, **pair_metrics(*rewards))
        return with_router_losses(loss, router, config), metrics

    return metrics_fn


def odds_ratio_preference(
    model: LlamaConfig, config: TrainConfig, platform: str, preference: PreferenceConfig
) -> MetricsFn:
    """`orpo_loss` over a batch's pairs; `Loss.count` is the number of pairs.

    The metrics are `accuracy` and `reward_margin` of the rewards beta log p, log p averaged over tokens, and
    `nll`, the first term of the loss: nats per token of the chosen answers, each with the same weight.

    Args:
      model, config, platform, preference: as for `simple_preference`.
    """
    mean_logprobs = _mean_logprobs(model, config, platform)

    def metrics_fn(params: Any, batch: Batch) -> tuple[Loss, Metrics]:
        chosen, rejected, router = mean_logprobs(params, batch)
        losses = orpo_loss(chosen, rejected, beta=preference.beta)
        rewards = (preference.beta * chosen, preference.beta * rejected)
        loss, metrics = masked_sums(pair_ends(batch), losses, nll=-chosen, **pair_metrics(*rewards))
        return with_router_losses(loss, router, config), metrics

    return metrics_fn


def _mean_logprobs(
    model: LlamaConfig, config: TrainConfig, platform: str
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array, RouterLosses | None]]:
    """Makes the function (params, batch) -> mean log-probabilities of both answers' tokens, f32 [B, T] each.

    They are to be read at a pair's last token. The third is the losses of a mixture's routers.
    """
    logprobs_fn = routed_logprobs(model, config, platform)

    def mean_logprobs(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, RouterLosses | None]:
        logprobs, router = logprobs_fn(params, batch)
        sums = pair_sums(logprobs, batch)
        counts = pair_sums(unshard_sequence(batch["mask"]).astype(jnp.float32), batch)
        chosen, rejected = (
            total / jnp.maximum(count, 1.0) for total, count in zip(sums, counts, strict=True)
        )
        return chosen, rejected, router

    return mean_logprobs
