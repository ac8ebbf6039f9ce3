"""The value model of PPO: a reward model that becomes the value function, a network beside the policy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax import LlamaConfig
from llama_jax.console import terminal
from llama_jax.errors import ConfigError
from llama_jax.text.pretrained import open_model

from .config.run import RunConfig


def value_config(run: RunConfig) -> LlamaConfig | None:
    """The configuration of `rl.value_model`; None if the run has none.

    Raises:
      ConfigError: if it has no head with one output.
      CheckpointError: if it cannot be read.
    """
    if run.train.objective != "ppo" or not run.rl.value_model:
        return None
    config = open_model(run.rl.value_model).plain_tensors().config
    if len(config.labels) != 1:
        what = f"a classifier with {len(config.labels)} outputs" if config.labels else "a language model"
        raise ConfigError(
            f"rl.value_model {run.rl.value_model!r} is {what}, and a value is one number: give a reward "
            'model, such as a run of train.objective = "reward", or leave it out for a new head on the policy'
        )
    return config


def check_value(run: RunConfig, value: LlamaConfig, model: LlamaConfig) -> None:
    """Checks that a value model reads the policy's rows.

    Raises:
      ConfigError: naming what differs.
    """
    name = f"rl.value_model {run.rl.value_model!r}"
    if value.vocab_size != model.vocab_size:
        raise ConfigError(
            f"{name} has a vocabulary of {value.vocab_size} and the policy of {model.vocab_size}: it reads "
            "the policy's tokens, so give one with the same tokenizer"
        )
    if run.train.seq_len > value.max_position_embeddings:
        raise ConfigError(
            f"train.seq_len is {run.train.seq_len}, and the context of {name} {value.max_position_embeddings}"
            ": set train.seq_len to at most that"
        )


def load_value(run: RunConfig, mesh: Mesh | None, dtype: jnp.dtype) -> Any:
    """Loads the value model's parameters, adapters merged, its head in f32.

    Raises:
      CheckpointError: if they cannot be read.
    """
    with terminal.progress_bar("loading the value model") as progress:
        params = open_model(run.rl.value_model).params(
            dtype=dtype, mesh=mesh, scan_layers=True, progress=progress
        )
    return {**params, "score": {"kernel": params["score"]["kernel"].astype(jnp.float32)}}
