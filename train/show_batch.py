"""`llama-jax train CONFIG --show-batch`: prints the first batch of a run, without creating the run."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import jax

from llama_jax.console import terminal
from llama_jax.console.loading import init_jax
from llama_jax.sharding import use_mesh
from llama_jax.tokenizer import Tokenizer
from llama_jax.tokenizer.fit import fit_vocabulary

from .config.run import RunConfig
from .data import Data, show_batch
from .devices import resolve_attention, run_mesh, start_jax
from .feed import Feed
from .initialization import check_context, load_initial_params, model_config
from .metrics.run_log import log_examples
from .rl.prompts import PromptData
from .rl.reward_models import RewardModels
from .rl.rewards import Rewards
from .rl.samples import SampleRecord, show_samples
from .rl.student import rollouts_of
from .setup import open_run_data
from .state import split_params
from .tokenizer import run_tokenizer
from .trainable import TrainableSpec
from .value_model import check_value, value_config


def print_first_batch(run: RunConfig) -> None:
    """Prints the first batch token by token; of reinforcement learning, completions with their rewards.

    Raises:
      LlamaJaxError: with a one-line message for bad input.
    """
    if run.samples:
        start_jax(run.mesh, run.distributed)
    init_jax()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = run_tokenizer(run, Path(directory))
        data = open_run_data(run, tokenizer, shard=0, num_shards=1)
        if isinstance(data, PromptData):
            show_samples(_first_samples(run, tokenizer, data), tokenizer, terminal.console())
            return
        with contextlib.closing(data.train()) as batches:
            show_batch(next(batches), tokenizer, terminal.console(), run.data_objective)
    assert isinstance(data, Data)
    log_examples(data, terminal.note)


def _first_samples(run: RunConfig, tokenizer: Tokenizer, data: PromptData) -> list[SampleRecord]:
    """The completions of the first step, by the model that the run starts from."""
    with contextlib.ExitStack() as stack:
        rewards = stack.enter_context(Rewards(run.rl, terminal.note)) if run.rl.rewards else None
        mesh = run_mesh(run.mesh)
        model = model_config(run, tokenizer)
        check_context(run, model)
        tokenizer = fit_vocabulary(tokenizer, model.vocab_size)
        stack.enter_context(use_mesh(mesh))
        platform = jax.devices()[0].platform
        run = resolve_attention(run, model, mesh, jax.local_devices()[0], terminal.note)
        if (value_model := value_config(run)) is not None:
            check_value(run, value_model, model)
        spec = TrainableSpec.from_config(run, platform, value_model=value_model)
        params = load_initial_params(run, mesh, spec)
        trainable, frozen = split_params(model, run.train.seed, params, spec)
        samples: list[SampleRecord] = []
        rollouts = rollouts_of(run)(
            run,
            model,
            platform,
            tokenizer,
            Feed.for_mesh(mesh, run.train.global_batch_size, run.train.seq_len),
            data,
            spec,
            frozen,
            rewards,
            RewardModels(run.rl, terminal.note, dtype="float32", template=run.data.template, mesh=mesh),
            log=terminal.note,
            write=samples.extend,
        )
        rollouts.first(trainable)
        return samples
