"""Pretraining and supervised finetuning: next-token prediction."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import LlamaConfig, next_token_loss, sharding
from llama_jax.loss import Loss

from ..config.train import TrainConfig
from .common import Batch, LossFn, forward_options, segment_lengths


def neftune_noise(key: jax.Array, segment_ids: jax.Array, hidden_size: int, alpha: float) -> jax.Array:
    """Noise for embeddings, uniform within alpha / sqrt(L D) (NEFTune, arXiv 2310.05914).

    L is the length of the token's own segment: the noise of an example does not depend on what it is packed
    with.

    Args:
      key: a random key.
      segment_ids: int [B, T].
      hidden_size: D.
      alpha: its scale.

    Returns:
      f32 [B, T, D].
    """
    # The rows of all slices, so that each gets the noise that it has without slices.
    slices = sharding.manual_size("data")
    shape, spec = (slices, *segment_ids.shape, hidden_size), P(None, *sharding.ACT_BTD)
    layout = sharding.out_sharding(spec, shape)
    unit = jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0, out_sharding=layout)
    unit = unit[jax.lax.axis_index("data") if slices > 1 else 0]
    lengths = sharding.constrain(segment_lengths(segment_ids)[..., None], sharding.ACT_BTD)
    return unit * (alpha / jnp.sqrt(lengths * hidden_size))


def language_modeling(model: LlamaConfig, config: TrainConfig, platform: str) -> LossFn:
    """Next-token prediction on packed documents; if a batch has a mask, on the tokens that it selects.

    With a key, as in training with `neftune_alpha`, `neftune_noise` is added to the embeddings.

    Args:
      model: the model's configuration.
      config: the `train` section.
      platform: the platform that it is compiled for, such as `tpu`.
    """
    options = forward_options(config, platform)

    def loss_fn(params: Any, batch: Batch, *, key: jax.Array | None = None) -> Loss:
        noise = None
        if key is not None:
            noise = neftune_noise(key, batch["segment_ids"], model.hidden_size, config.neftune_alpha)
        return next_token_loss(
            model,
            params,
            batch["tokens"],
            mask=batch["mask"] if "mask" in batch else batch["segment_ids"] > 0,
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
            num_chunks=config.loss_chunks,
            z_loss=jnp.float32(config.z_loss),
            router_aux_loss=config.router_aux_loss_coef,
            router_z_loss=config.router_z_loss_coef,
            embedding_noise=noise,
            options=options,
        )

    return loss_fn
