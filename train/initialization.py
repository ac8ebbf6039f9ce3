"""What a run begins with: the shape of its model, and the weights that it starts from."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax import LlamaConfig
from llama_jax.console import terminal
from llama_jax.errors import ConfigError
from llama_jax.text.pretrained import open_model
from llama_jax.tokenizer import Tokenizer
from llama_jax.weights.hf import unnamed
from llama_jax.weights.source import brief

from .config.finetune import HEADS
from .config.run import RunConfig
from .trainable import Tuning


def starting_model(run: RunConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """The model that a run trains, with the labels of its head where the objective has one.

    Raises:
      ConfigError: for a shape that cannot work, or a model of another kind than the objective needs.
      CheckpointError: if `model.init_from` cannot be read.
    """
    if not run.model.init_from:
        return with_labels(run, run.model.build(tokenizer.vocab_size))
    found = open_model(run.model.init_from).weights_alone().config
    model = with_labels(run, found)
    if found.labels:
        _check_head(run, found.labels, model.labels)
    return model


def with_labels(run: RunConfig, model: LlamaConfig) -> LlamaConfig:
    """The model with the labels of the head that the run's objective trains; without any if it has none."""
    labels: tuple[str, ...] = ()
    if run.train.objective in HEADS:
        labels = run.data.labels if run.train.objective == "classify" else unnamed(1)
    return model.replace(labels=labels)


def starting_weights(run: RunConfig, mesh: Mesh | None, tuning: Tuning) -> Any:
    """The weights that a run starts from, its base's adapters merged; None where they are random."""
    if not run.model.init_from:
        return None
    # What is frozen is not read in more precision than it is kept in.
    dtype = jnp.float32 if tuning.adapter is None or tuning.base == "float32" else jnp.bfloat16
    with terminal.progress_bar("loading weights") as progress:
        opened = open_model(run.model.init_from)
        return opened.params(dtype=dtype, mesh=mesh, scan_layers=True, progress=progress)


def _check_head(run: RunConfig, found: tuple[str, ...], labels: tuple[str, ...]) -> None:
    """Checks that the head of the model that a run starts from is what its objective trains."""
    where = f"model.init_from {run.model.init_from!r}"
    if not labels:
        raise ConfigError(
            f'{where} is a classifier or reward model, and train.objective "{run.train.objective}" needs a '
            "language model; give the one that it was made from"
        )
    if len(found) != len(labels):
        what = f"with {len(labels)} data.labels" if run.train.objective == "classify" else "needs one"
        raise ConfigError(
            f"{where} has a head of {len(found)} ({brief(found, 6)}), and train.objective "
            f'"{run.train.objective}" {what}; make them fit, or start from a language model'
        )
    if set(found) == set(labels) and found != labels:
        raise ConfigError(
            f"data.labels are {brief(labels, 6)}, and the head of {where} has them as {brief(found, 6)}; "
            "list them in its order"
        )
