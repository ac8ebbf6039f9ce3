"""The data of a run, opened as its settings say; and its first batch, printed."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import jax

from llama_jax.console import terminal
from llama_jax.console.loading import init_jax
from llama_jax.tokenizer import Tokenizer

from .config.run import RunConfig
from .data import Data, Peers, open_data, show_batch
from .gather import gather_bytes
from .metrics.run_log import log_examples
from .tokenizer import run_tokenizer


def open_run_data(run: RunConfig, tokenizer: Tokenizer, *, shard: int, num_shards: int) -> Data:
    """Opens the data of a run.

    Args:
      run: its configuration.
      tokenizer: its tokenizer.
      shard, num_shards: this process's part of the rows of every batch.

    Raises:
      ConfigError, DataError: as `open_data`.
    """
    return open_data(
        run.data,
        tokenizer,
        objective=run.data_objective,
        seq_len=run.train.seq_len,
        batch_size=run.train.global_batch_size,
        seed=run.train.seed,
        process_index=shard,
        process_count=num_shards,
        peers=Peers(jax.process_index(), jax.process_count(), gather_bytes),
    )


def print_first_batch(run: RunConfig) -> None:
    """Prints the first batch of a run, token by token, without creating the run.

    Raises:
      LlamaJaxError: with a one-line message for bad input.
    """
    init_jax()
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = run_tokenizer(run, Path(directory))
        data = open_run_data(run, tokenizer, shard=0, num_shards=1)
        with contextlib.closing(data.train()) as batches:
            show_batch(next(batches), tokenizer, terminal.console(), run.data_objective)
    log_examples(data, terminal.note)
