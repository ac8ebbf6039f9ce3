"""Pretraining and supervised finetuning: next-token prediction."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig, next_token_loss, sharding
from llama_jax.loss import Loss

from ..config.train import TrainConfig
from .common import Batch, LossFn, forward_options


def language_modeling(model: LlamaConfig, config: TrainConfig, platform: str) -> LossFn:
    """Next-token prediction on packed documents; if a batch has a mask, on the tokens that it selects.

    With a key, as in training with `neftune_alpha`, noise is added to the embeddings.

    Args:
      model: the model's configuration.
      config: the `train` section.
      platform: the platform that it is compiled for, such as `tpu`.
    """
    options = forward_options(config, platform)

    def neftune_noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        bound = config.neftune_alpha / (shape[1] * model.hidden_size) ** 0.5
        layout = sharding.out_sharding(sharding.ACT_BTD)
        shape_btd = (*shape, model.hidden_size)
        return jax.random.uniform(key, shape_btd, jnp.float32, -bound, bound, out_sharding=layout)

    def loss_fn(params: Any, batch: Batch, *, key: jax.Array | None = None) -> Loss:
        return next_token_loss(
            model,
            params,
            batch["tokens"],
            mask=batch["mask"] if "mask" in batch else batch["segment_ids"] > 0,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            num_chunks=config.loss_chunks,
            z_loss=jnp.float32(config.z_loss),
            embedding_noise=None if key is None else neftune_noise(key, batch["tokens"].shape),
            options=options,
        )

    return loss_fn
