"""Kahneman-Tversky optimization: completions that are labeled desirable or undesirable, one by one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig, sharding
from llama_jax.loss import Loss

from ..config.preference import PreferenceConfig
from ..config.train import TrainConfig
from .common import (
    Batch,
    Metrics,
    MetricsFn,
    masked_sums,
    pair_ends,
    pair_sums,
    unshard_sequence,
    with_router_losses,
)
from .preference import masked_logprobs, routed_logprobs


def kto_loss(
    policy: jax.Array,
    reference: jax.Array,
    desirable: jax.Array,
    kl: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Kahneman-Tversky optimization (KTO, arXiv 2402.01306, eq. 8).

    With r = log p / p_ref of a completion, and w the weight of its label:

        w (1 - s(beta (r - kl)))    if it is desirable
        w (1 - s(beta (kl - r)))    otherwise

    Args:
      policy, reference: f32 [P], summed log-probabilities of the completions.
      desirable: bool [P], the labels.
      kl: f32 [], the KL divergence of the policy from the reference model, a constant of the loss.
      beta: how far the policy may go from the reference model.
      desirable_weight, undesirable_weight: of the losses by label.

    Returns:
      The losses; the implicit rewards beta r, without gradients; f32 [P] each.
    """
    gain = policy - reference
    signed = jnp.where(desirable, gain - kl, kl - gain)
    weights = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weights * jax.nn.sigmoid(-beta * signed), jax.lax.stop_gradient(beta * gain)


def labeled_preference(
    model: LlamaConfig, config: TrainConfig, platform: str, preference: PreferenceConfig
) -> MetricsFn:
    """`kto_loss` over a batch's examples; `Loss.count` is their number.

    An example is a pair of segments: its own, with its label as `value`, and its prompt with another
    completion (`data.mismatched`). The KL divergence is estimated as in TRL: the mean of log p / p_ref of the
    latter over the (micro)batch, at least 0.

    The function takes `reference` as `direct_preference` does. Its metrics are the mean rewards
    `reward_desirable` and `reward_undesirable`, and `kl`.

    Args:
      model: the model's configuration.
      config: the `train` section.
      platform: the platform that it is compiled for, such as `tpu`.
      preference: the `preference` section.
    """
    logprobs_fn = masked_logprobs(model, config, platform)
    routed_logprobs_fn = routed_logprobs(model, config, platform)

    def metrics_fn(params: Any, batch: Batch, *, reference: Any = None) -> tuple[Loss, Metrics]:
        logprobs, router = routed_logprobs_fn(params, batch)
        policy, mismatched = pair_sums(logprobs, batch)
        if reference is None:
            values = unshard_sequence(batch["reference"])
        else:
            values = jax.lax.stop_gradient(logprobs_fn(reference, batch))
        reference_policy, reference_mismatched = pair_sums(values, batch)
        ends = pair_ends(batch)
        kl = _mean(jax.lax.stop_gradient(mismatched - reference_mismatched), ends)
        kl = jnp.maximum(kl, 0.0)
        labels, _ = pair_sums(unshard_sequence(batch["value"]), batch)
        losses, rewards = kto_loss(
            policy,
            reference_policy,
            labels > 0,
            kl,
            beta=preference.beta,
            desirable_weight=preference.desirable_weight,
            undesirable_weight=preference.undesirable_weight,
        )
        loss, metrics = masked_sums(ends, losses, kl=kl + jnp.zeros_like(losses))
        for name, mask in (("desirable", labels > 0), ("undesirable", labels == 0)):
            metrics[f"reward_{name}"], _ = masked_sums(ends & mask, rewards)
        return with_router_losses(loss, router, config), metrics

    return metrics_fn


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over the rows of all devices, slices included, where `mask` is set."""
    total, count = jnp.where(mask, values, 0.0).sum(), mask.sum().astype(jnp.float32)
    if sharding.manual_size("data") > 1:
        total, count = jax.lax.psum((total, count), "data")
    return total / jnp.maximum(count, 1.0)
