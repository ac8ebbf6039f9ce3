"""Objectives with a head on the last token: reward models, classification and regression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import LlamaConfig, sharding
from llama_jax.loss import Loss
from llama_jax.model import routed_hidden_states
from llama_jax.ops.router_losses import RouterLosses

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
    segment_ends,
    unshard_sequence,
    with_router_losses,
)


def ranking_loss(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0) -> jax.Array:
    """-log s(r_chosen - r_rejected - margin): Bradley-Terry with Llama 2's margin (arXiv 2307.09288, eq. 2).

    Args:
      chosen, rejected: f32 [P], the rewards of both answers.
      margin: f32 [P], how much better the chosen answer was judged to be; the paper's tables 27 and 28.

    Returns:
      f32 [P].
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)


def reward(model: LlamaConfig, config: TrainConfig, platform: str) -> MetricsFn:
    """`ranking_loss` over a batch's pairs; `value` at the chosen answer's last token is the margin."""
    head_outputs = _head_outputs(model, config, platform)

    def metrics_fn(params: Any, batch: Batch) -> tuple[Loss, Metrics]:
        ends = segment_ends(unshard_sequence(batch["segment_ids"]))
        outputs, router = head_outputs(params, batch)
        rewards = jnp.where(ends, outputs[..., 0], 0.0)
        chosen, rejected = pair_sums(rewards, batch)
        margin, _ = pair_sums(unshard_sequence(batch["value"]), batch)
        losses = ranking_loss(chosen, rejected, margin)
        loss, metrics = masked_sums(pair_ends(batch), losses, **pair_metrics(chosen, rejected))
        return with_router_losses(loss, router, config), metrics

    return metrics_fn


def classification(model: LlamaConfig, config: TrainConfig, platform: str) -> MetricsFn:
    """Cross-entropy of the head's logits at each example's last token, where `value` is the label.

    The metrics are `accuracy` and `confusion` [C, C], the confusion matrix with labels by row.
    """
    head_outputs = _head_outputs(model, config, platform)

    def metrics_fn(params: Any, batch: Batch) -> tuple[Loss, Metrics]:
        logits, router = head_outputs(params, batch)
        labels = unshard_sequence(batch["value"]).astype(jnp.int32)
        classes = jnp.arange(logits.shape[-1])
        label_logits = jnp.where(classes == labels[..., None], logits, 0.0).sum(-1)
        losses = jax.nn.logsumexp(logits, axis=-1) - label_logits
        predictions = jnp.argmax(logits, axis=-1)
        ends = segment_ends(unshard_sequence(batch["segment_ids"]))
        loss, metrics = masked_sums(ends, losses, accuracy=predictions == labels)
        one_hot_labels = ((labels[..., None] == classes) & ends[..., None]).astype(jnp.float32)
        one_hot_predictions = (predictions[..., None] == classes).astype(jnp.float32)
        replicated = sharding.out_sharding(P(None, None))
        confusion = jnp.einsum("btc,btd->cd", one_hot_labels, one_hot_predictions, out_sharding=replicated)
        return with_router_losses(loss, router, config), metrics | {"confusion": confusion}

    return metrics_fn


def regression(model: LlamaConfig, config: TrainConfig, platform: str) -> MetricsFn:
    """Squared error of the head's output at each example's last token, where `value` is the target."""
    head_outputs = _head_outputs(model, config, platform)

    def metrics_fn(params: Any, batch: Batch) -> tuple[Loss, Metrics]:
        outputs, router = head_outputs(params, batch)
        errors = outputs[..., 0] - unshard_sequence(batch["value"])
        ends = segment_ends(unshard_sequence(batch["segment_ids"]))
        loss, metrics = masked_sums(ends, errors**2, mean_absolute_error=jnp.abs(errors))
        return with_router_losses(loss, router, config), metrics

    return metrics_fn


def _head_outputs(
    model: LlamaConfig, config: TrainConfig, platform: str
) -> Callable[[Any, Batch], tuple[jax.Array, RouterLosses | None]]:
    """Makes the function (params, batch) -> the head's outputs f32 [B, T, C], and the routers' losses."""
    options = forward_options(config, platform)

    def head_outputs(params: Any, batch: Batch) -> tuple[jax.Array, RouterLosses | None]:
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        x, router = routed_hidden_states(model, params, *inputs, options=options)
        x = sharding.constrain(x, P(sharding.BATCH, None, None)).astype(jnp.float32)
        return jnp.einsum("btd,dc->btc", x, params["score"]["kernel"], precision="highest"), router

    return head_outputs
