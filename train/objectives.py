"""What is minimised: from parameters and a batch to a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig, next_token_loss
from llama_jax.loss import Loss
from train.config import TrainConfig
from train.devices import attention_backend, compute_dtype

Batch = Mapping[str, jax.Array]  # tokens, segment_ids, positions: int32 [B, T]; segment 0 is padding
Objective = Callable[[Any, Batch], Loss]


def pretraining(model: LlamaConfig, config: TrainConfig, platform: str) -> Objective:
    """Next-token prediction on packed documents.

    Args:
      model: the model.
      config: the `train` section, which says how to compute.
      platform: what the step is compiled for, such as `tpu`.
    """
    dtype, attention = compute_dtype(config, platform), attention_backend(config, platform)

    def objective(params: Any, batch: Batch) -> Loss:
        return next_token_loss(
            model,
            params,
            batch["tokens"],
            mask=batch["segment_ids"] > 0,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            dtype=dtype,
            attention_backend=attention,
            remat=config.remat,
            backward="fast",
            num_chunks=config.loss_chunks,
            z_loss=jnp.float32(config.z_loss),
        )

    return objective
