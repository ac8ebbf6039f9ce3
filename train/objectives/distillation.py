"""Distillation: a student learns its teacher's distribution of each next token."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig
from llama_jax.layers import output_matrix
from llama_jax.loss import Loss, next_token_loss, prediction_weights
from llama_jax.model import hidden_states
from llama_jax.ops.fused_divergence import Divergence, fused_divergence
from llama_jax.ops.quantization import Quantized

from ..config.distillation import DistillationConfig
from ..config.train import TrainConfig
from ..network import Network
from .common import Batch, Metrics, MetricsFn, forward_options


def divergence_from_teacher(
    model: LlamaConfig, config: TrainConfig, platform: str, settings: DistillationConfig
) -> MetricsFn:
    """The divergence of the model from its teacher at each prediction, as `settings` say; `Divergence`.

    `Loss.count` is the number of predictions, which a batch's mask selects if it has one. The function takes
    `teacher`, a `Network`. Its metrics are `cross_entropy` and `teacher_cross_entropy`, both models' nats per
    token on the data itself.

    Args:
      model: the model's configuration.
      config: the `train` section.
      platform: the platform that it is compiled for, such as `tpu`.
      settings: the `distillation` section.
    """
    options = forward_options(config, platform)
    divergence = Divergence(settings.beta, settings.temperature, settings.top_k)

    def metrics_fn(params: Any, batch: Batch, *, teacher: Network) -> tuple[Loss, Metrics]:
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        mask = batch["mask"] if "mask" in batch else batch["segment_ids"] > 0
        weights = prediction_weights(mask.astype(jnp.float32), batch["segment_ids"])

        def head(model: LlamaConfig, params: Any) -> tuple[jax.Array, Any]:
            return hidden_states(model, params, *inputs, options=options), _with_dense_head(params)

        student, teacher_head = head(model, params), head(teacher.config, teacher.params)
        total = fused_divergence(divergence, student, teacher_head, weights, num_chunks=config.loss_chunks)

        def cross_entropy(model: LlamaConfig, params: Any) -> jax.Array:
            tokens, positions, segment_ids = inputs
            return next_token_loss(
                model,
                params,
                tokens,
                mask,
                positions,
                segment_ids,
                options=options,
                num_chunks=config.loss_chunks,
            ).total

        metrics: Metrics = {
            "cross_entropy": cross_entropy(model, params),
            "teacher_cross_entropy": cross_entropy(teacher.config, teacher.params),
        }
        return Loss(total=total, count=weights.sum()), metrics

    return metrics_fn


def _with_dense_head(params: Any) -> Any:
    """The parameters; of a quantized output projection, which has no gradient, dequantized as [V, D]."""
    weight = output_matrix(params)
    if not isinstance(weight, Quantized):
        return params
    return {"embed": {"embedding": jax.lax.stop_gradient(weight.dequantize())}}
