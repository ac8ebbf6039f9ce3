"""From parameters and a batch to a loss: one file for each kind of objective.

`make_metrics_fn` and `make_loss_fn` select it by `train.objective`. Rows are packed: an example is a segment
of a row, and of a pair the odd segment is the chosen answer and the next, even one the rejected. Quantities
of an example or a pair are read at its last token: losses are sums over [B, T], masked to those tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from llama_jax import LlamaConfig
from llama_jax.loss import Loss
from llama_jax.ops.eight_bits import eight_bit_products

from ..config.run import RunConfig
from ..config.train import TrainConfig
from .common import Batch, LossFn, MetricsFn
from .distillation import divergence_from_teacher
from .heads import classification, regression, reward
from .kto import labeled_preference
from .language_modeling import language_modeling
from .policy import policy_optimization
from .ppo import proximal_policy
from .preference import direct_preference
from .reference_free import odds_ratio_preference, simple_preference

__all__ = ["make_loss_fn", "make_metrics_fn", "with_prefix_backend"]


def with_prefix_backend(run: RunConfig) -> TrainConfig:
    """The `train` section, with an attention backend that supports the run's adapter."""
    if run.adapter.type == "prefix" and run.train.attention == "auto":  # splash attention takes no prefix
        return dataclasses.replace(run.train, attention="blockwise")
    return run.train


def make_metrics_fn(run: RunConfig, model: LlamaConfig, platform: str, *, packed: bool = True) -> MetricsFn:
    """Makes the run's objective, with the metrics that evaluation reports beside the loss.

    Args:
      run: the run's configuration.
      model: the model's configuration.
      platform: the platform that it is compiled for, such as `tpu`.
      packed: whether a row may have more than one of the completions of policy optimization. Where it has one
        logits are computed for that alone.
    """
    train = with_prefix_backend(run)
    match train.objective:
        case "pretrain" | "sft":
            loss_fn = language_modeling(model, train, platform)
            return lambda params, batch, **kwargs: (loss_fn(params, batch, **kwargs), {})
        case "dpo":
            return direct_preference(model, train, platform, run.preference)
        case "simpo":
            return simple_preference(model, train, platform, run.preference)
        case "orpo":
            return odds_ratio_preference(model, train, platform, run.preference)
        case "distill":
            return divergence_from_teacher(model, train, platform, run.distillation)
        case "kto":
            return labeled_preference(model, train, platform, run.preference)
        case "grpo":
            return policy_optimization(model, train, platform, run.rl, packed=packed)
        case "ppo":
            return proximal_policy(model, train, platform, run.rl, packed=packed)
        case "reward":
            return reward(model, train, platform)
        case "classify":
            return classification(model, train, platform)
        case "regress":
            return regression(model, train, platform)


def make_loss_fn(run: RunConfig, model: LlamaConfig, platform: str, *, packed: bool = True) -> LossFn:
    """`make_metrics_fn` without the metrics, and with the products of `train.quantization`.

    With a key, gradients are rounded stochastically, and NEFTune's noise is added, where the run asks for it.
    """
    metrics_fn, train = make_metrics_fn(run, model, platform, packed=packed), run.train

    def loss_fn(params: Any, batch: Batch, *, key: jax.Array | None = None, **kwargs: Any) -> Loss:
        if train.quantization != "none":
            rounding = jax.random.fold_in(key, 1) if key is not None and train.stochastic_rounding else None
            scales = train.quantization_scales
            params = eight_bit_products(params, train.quantization, rounding, scales)
            if (reference := kwargs.get("reference")) is not None:
                kwargs["reference"] = eight_bit_products(reference, train.quantization, scales=scales)
            if (teacher := kwargs.get("teacher")) is not None:
                quantized = eight_bit_products(teacher.params, train.quantization, scales=scales)
                kwargs["teacher"] = dataclasses.replace(teacher, params=quantized)
        if key is not None and train.neftune_alpha:
            kwargs["key"] = key
        return metrics_fn(params, batch, **kwargs)[0]

    return loss_fn
