"""What is planned: the model that a run trains, and its batch on other slices than its own."""

from __future__ import annotations

import dataclasses

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.plan.topology import Topology
from llama_jax.text.pretrained import open_model
from llama_jax.weights.hf import default_labels

from ..config.rl import model_of as reward_model_path
from ..config.run import ModelConfig, RunConfig
from ..trainable import TrainableSpec, with_labels
from ..value_model import value_config


def with_rows_per_chip(run: RunConfig, topology: Topology) -> RunConfig:
    """The run with its batch size scaled to slices other than those that it is written for.

    The number of sequences per chip stays the same, so that one config can be compared across slices.

    Args:
      run: its `mesh.topology`, `mesh.slices` times, is what it is written for.
      topology: the slices.
    """
    if not run.mesh.topology:
        return run
    written_for = dataclasses.replace(Topology.parse(run.mesh.topology), slices=run.mesh.slices)
    batch_size = max(run.train.global_batch_size * topology.chips // written_for.chips, 1)
    return dataclasses.replace(run, train=dataclasses.replace(run.train, global_batch_size=batch_size))


def model_of(run: RunConfig, shape: str | None = None) -> LlamaConfig:
    """The configuration of the model that a run trains.

    Args:
      run: the run's configuration.
      shape: a preset to use for `model.init_from`, whose weights need not be on this machine then.

    Raises:
      ConfigError: for an unknown shape, or one that is given without `model.init_from`.
      CheckpointError: if the weights are not on this machine, and no shape is given.
    """
    if shape is None and run.model.init_from:
        return with_labels(run, run.model.extended(open_model(run.model.init_from).config))
    if shape is not None and not run.model.init_from:
        raise ConfigError(f"--shape is {shape!r} and model.init_from is not set: set model.preset instead")
    vocab_size = run.tokenizer.vocab_size or None
    if shape is not None:
        return with_labels(run, run.model.extended(ModelConfig(preset=shape).build(vocab_size)))
    return with_labels(run, run.model.build(vocab_size))


def reward_models_of(run: RunConfig, model: LlamaConfig) -> tuple[LlamaConfig, ...]:
    """The reward models of a run's rollouts; those not on this machine have the policy's shape."""
    paths = [path for spec in run.rl.rewards if (path := reward_model_path(spec)) is not None]
    found = []
    for path in paths if run.samples else ():
        try:
            found.append(open_model(path).plain_tensors().config)
        except CheckpointError:
            found.append(model.replace(labels=default_labels(1)))
    return tuple(found)


def spec_of(run: RunConfig, model: LlamaConfig) -> TrainableSpec:
    """What is trained for a TPU; a value model that is not on this machine has the policy's architecture."""
    try:
        value_model = value_config(run)
    except CheckpointError:
        value_model = model.replace(labels=default_labels(1))
    return TrainableSpec.from_config(run, "tpu", len(model.labels), value_model)
