"""Direct preference optimization over packed pairs: DPO, conservative DPO and IPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig
from llama_jax.loss import Loss, routed_token_logprobs
from llama_jax.ops.router_losses import RouterLosses

from ..config.preference import LossType, PreferenceConfig
from ..config.train import TrainConfig
from .common import (
    Batch,
    Metrics,
    MetricsFn,
    forward_options,
    masked_sums,
    pair_ends,
    pair_metrics,
    pair_sums,
    segment_cumsum,
    segment_ends,
    unshard_sequence,
    with_router_losses,
)


def dpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Direct preference optimization (arXiv 2305.18290), conservative DPO, and IPO (arXiv 2310.12036).

    With r = log p / p_ref of an answer, and m = r_chosen - r_rejected:

        sigmoid: -(1 - e) log s(beta m) - e log s(-beta m), e the label smoothing (cDPO if it is not 0)
        ipo:     (m - 1 / (2 beta))^2, with log-probabilities averaged over an answer's tokens

    Args:
      policy_chosen, policy_rejected: f32 [P], the policy's summed log-probabilities of the answers.
      reference_chosen, reference_rejected: f32 [P], the reference model's.
      beta: strength of the implicit KL penalty towards the reference model.
      loss_type: which loss.
      label_smoothing: assumed probability that a pair's labels are swapped, below 0.5.
      lengths: f32 [P] each, the numbers of tokens of the answers; `ipo` divides by them.

    Returns:
      The losses; the implicit rewards beta r of the chosen and of the rejected answers, without gradients;
      f32 [P] each.
    """
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    rewards = (jax.lax.stop_gradient(beta * chosen), jax.lax.stop_gradient(beta * rejected))
    if loss_type == "ipo":
        if lengths is not None:
            chosen, rejected = chosen / jnp.maximum(lengths[0], 1.0), rejected / jnp.maximum(lengths[1], 1.0)
        return (chosen - rejected - 1 / (2 * beta)) ** 2, *rewards
    margin = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(
        -margin
    )
    return losses, *rewards


def direct_preference(
    model: LlamaConfig, config: TrainConfig, platform: str, preference: PreferenceConfig
) -> MetricsFn:
    """`dpo_loss` over a batch's pairs; `Loss.count` is the number of pairs.

    The function takes `reference`, the reference model's parameters, unless the batch carries its precomputed
    log-probabilities. Its metrics are `accuracy`, the fraction of pairs whose chosen answer has the larger
    implicit reward (ties count half), and `reward_margin`.

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
        policy_logprobs = pair_sums(logprobs, batch)
        if reference is None:
            reference_logprobs = pair_sums(unshard_sequence(batch["reference"]), batch)
        else:
            reference_logprobs = jax.lax.stop_gradient(pair_sums(logprobs_fn(reference, batch), batch))
        losses, chosen, rejected = dpo_loss(
            *policy_logprobs,
            *reference_logprobs,
            beta=preference.beta,
            loss_type=preference.loss_type,
            label_smoothing=preference.label_smoothing,
            lengths=pair_sums(unshard_sequence(batch["mask"]).astype(jnp.float32), batch),
        )
        loss, metrics = masked_sums(pair_ends(batch), losses, **pair_metrics(chosen, rejected))
        return with_router_losses(loss, router, config), metrics

    return metrics_fn


def answer_logprobs(
    model: LlamaConfig, config: TrainConfig, platform: str
) -> Callable[[Any, Batch], jax.Array]:
    """Makes the function (params, batch) -> answers' log-probabilities, `reference` of `Batch`."""
    logprobs_fn = masked_logprobs(model, config, platform)

    def logprobs(params: Any, batch: Batch) -> jax.Array:
        segments = unshard_sequence(batch["segment_ids"])
        sums = segment_cumsum(logprobs_fn(params, batch), segments)
        return jnp.where(segment_ends(segments), sums, 0.0)

    return logprobs


def masked_logprobs(
    model: LlamaConfig, config: TrainConfig, platform: str
) -> Callable[[Any, Batch], jax.Array]:
    """Makes the function (params, batch) -> log-probabilities f32 [B, T] of tokens in the mask, else 0."""
    logprobs = routed_logprobs(model, config, platform)
    return lambda params, batch: logprobs(params, batch)[0]


def routed_logprobs(
    model: LlamaConfig, config: TrainConfig, platform: str
) -> Callable[[Any, Batch], tuple[jax.Array, RouterLosses | None]]:
    """`masked_logprobs`, and the losses of a mixture's routers."""
    options = forward_options(config, platform)

    def logprobs(params: Any, batch: Batch) -> tuple[jax.Array, RouterLosses | None]:
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        values, router = routed_token_logprobs(
            model, params, *inputs, num_chunks=config.loss_chunks, options=options
        )
        return values * unshard_sequence(batch["mask"]), router

    return logprobs
