"""From parameters and a batch to a loss: one file for each kind of objective.

`make_metrics_fn` and `make_loss_fn` select it by `train.objective`. Rows are packed: an example is a segment
of a row, and of a pair the odd segment is the chosen answer and the next, even one the rejected. Quantities
of an example or a pair are read at its last token: losses are sums over [B, T], masked to those tokens.
"""

from __future__ import annotations

import dataclasses

from llama_jax import LlamaConfig

from ..config.run import RunConfig
from .common import LossFn, MetricsFn
from .heads import classification, regression, reward
from .language_modeling import language_modeling
from .preference import direct_preference

__all__ = ["make_loss_fn", "make_metrics_fn"]


def make_metrics_fn(run: RunConfig, model: LlamaConfig, platform: str) -> MetricsFn:
    """Makes the run's objective, with the metrics that evaluation reports beside the loss.

    Args:
      run: the run's configuration.
      model: the model's configuration.
      platform: the platform that it is compiled for, such as `tpu`.
    """
    train = run.train
    if run.adapter.type == "prefix" and train.attention == "auto":  # splash attention supports no prefix
        train = dataclasses.replace(train, attention="blockwise")
    match train.objective:
        case "pretrain" | "sft":
            loss_fn = language_modeling(model, train, platform)
            return lambda params, batch, **kwargs: (loss_fn(params, batch, **kwargs), {})
        case "dpo":
            return direct_preference(model, train, platform, run.preference)
        case "reward":
            return reward(model, train, platform)
        case "classify":
            return classification(model, train, platform)
        case "regress":
            return regression(model, train, platform)


def make_loss_fn(run: RunConfig, model: LlamaConfig, platform: str) -> LossFn:
    """`make_metrics_fn` without the metrics."""
    metrics_fn = make_metrics_fn(run, model, platform)
    return lambda params, batch, **kwargs: metrics_fn(params, batch, **kwargs)[0]
