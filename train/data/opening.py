"""Opening a run's data: its sources found, indexed, split, and checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from llama_jax.chat import chat_template
from llama_jax.errors import ConfigError, DataError, TokenizerError
from llama_jax.tokenizer import Tokenizer

from ..config.data import DataConfig, SourceConfig
from ..config.objective import Objective
from .dataset import Data
from .encode import Encoder
from .examples import ExampleEncoder, ExampleSource
from .forms import Forms
from .parts import all_held_out, split
from .records import BadRecord, held_out, keys, refusal
from .source import Source, open_records, open_source


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    objective: Objective = "pretrain",
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Opens a run's data: finds and indexes the files, and splits them. Globs begin in the current directory.

    The global batches are a function of the data, the tokenizer, `seed`, `batch_size`, `seq_len` and the
    step; not of the processes or workers that make them.

    Args:
      config: what to read.
      tokenizer: of the model.
      objective: what the run learns, which says what its records hold (forms.py).
      seq_len: T, tokens a row.
      batch_size: B, rows of a global batch.
      seed: of the order of documents.
      process_index, process_count: which contiguous share of the rows is this process's.

    Raises:
      ConfigError: for sizes that cannot work.
      DataError: if there is no data, too little, or it cannot be read.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seq_len", seq_len, 2)):
        if value < least:
            raise ConfigError(f"train.{name} is {value}; it must be at least {least}")
    if batch_size % process_count:
        raise ConfigError(
            f"train.global_batch_size is {batch_size}, which {process_count} processes cannot share equally; "
            "make it a multiple of that"
        )
    encode = Encoder(tokenizer)
    opened: Callable[[SourceConfig], Source | ExampleSource] = functools.partial(open_source, encode=encode)
    if objective != "pretrain":
        examples = _examples(config, encode, objective, seq_len)
        opened = functools.partial(_open_examples, examples=examples, skip=config.bad_records == "skip")
    rows = batch_size // process_count
    parts = [split(source, config, opened(source)) for source in config.sources]
    apart = []
    if config.validation_files:
        source = dataclasses.replace(config.sources[0], files=config.validation_files, exclude=(), weight=1.0)
        apart = [all_held_out(source, opened(source), parts)]
    return Data(
        config,
        parts,
        apart,
        encode,
        objective=objective,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        mine=range(process_index * rows, (process_index + 1) * rows),
    )


def _examples(
    config: DataConfig, encode: Encoder, objective: Objective, seq_len: int
) -> tuple[Forms, ExampleEncoder]:
    """Returns what reads the records of a finetuning run, and what encodes them."""
    template = None
    try:
        template = chat_template(encode.tokenizer, config.template or None)
    except TokenizerError:
        if config.template or encode.tokenizer.chat_template is not None:
            raise
    if objective == "classify" and not config.labels:
        raise ConfigError("data.labels is empty; name the classes there, in the order of their numbers")
    forms = Forms(objective, config.sources[0].field, template is not None, config.labels)
    return forms, ExampleEncoder(encode, template, objective, seq_len, config.too_long)


def _open_examples(config: SourceConfig, examples: tuple[Forms, ExampleEncoder], skip: bool) -> ExampleSource:
    forms, encode = examples
    forms = dataclasses.replace(forms, field=config.field)
    source = ExampleSource(config, open_records(config, rows=True), forms, encode)
    try:
        source.detect(skip)
    except BadRecord as bad:
        raise DataError(refusal(bad.message) if bad.reason != "no known form" else bad.message) from None
    return source


def train_texts(config: DataConfig) -> Iterator[str]:
    """Yields the documents that are trained on, in the order they lie: what a tokenizer may learn from.

    Raises:
      DataError: if there is none, or one cannot be read.
    """
    for source in config.sources:
        records = open_records(source)
        held = held_out(keys([file.name for file in records.files], records.counts), config.share)
        for index in np.flatnonzero(~held).tolist():
            try:
                yield records.text(index)
            except BadRecord as bad:
                if config.bad_records == "fail":
                    raise DataError(refusal(bad.message)) from None
