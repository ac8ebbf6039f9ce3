"""Opens a run's data: finds, indexes, splits and checks its sources."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

from llama_jax.chat import chat_template
from llama_jax.errors import ConfigError, DataError, TokenizerError
from llama_jax.tokenizer import Tokenizer

from ..config.data import DataConfig, SourceConfig
from ..config.objective import Objective
from .dataset import Data
from .encode import Encoder
from .examples import ExampleEncoder, ExampleSource
from .formats import RecordFormats
from .mismatched import MismatchedSource
from .parts import split, validation_config, validation_part
from .records import BadRecord, bad_record_error
from .sharing import ALONE, Peers
from .source import Source, open_records, open_source
from .splitting import TrainingRecords, validation_records


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
    peers: Peers = ALONE,
) -> Data:
    """Opens a run's data: finds, indexes and splits the files. Globs are relative to the current directory.

    The global batches are a function of the data, the tokenizer, `seed`, `batch_size`, `seq_len` and the
    step, not of the number of processes or workers.

    Args:
      config: the `[data]` section.
      tokenizer: the model's.
      objective: the run's, which determines the record formats (formats.py).
      seq_len: T, tokens per row.
      batch_size: B, rows of a global batch.
      seed: of the data order.
      process_index, process_count: select this process's contiguous shard of the rows.
      peers: the processes of the run, which encode the validation set together.

    Raises:
      ConfigError: for invalid sizes.
      DataError: if there is no data, too little, or it cannot be read.
    """
    for name, value, least in (("global_batch_size", batch_size, 1), ("seq_len", seq_len, 2)):
        if value < least:
            raise ConfigError(f"train.{name} is {value}; it must be at least {least}")
    if batch_size % process_count:
        raise ConfigError(
            f"train.global_batch_size is {batch_size}, which {process_count} processes do not divide; "
            "make it a multiple"
        )
    encode = Encoder(tokenizer, config.parse_special)
    open_one: Callable[[SourceConfig], Source | ExampleSource] = functools.partial(open_source, encode=encode)
    if objective != "pretrain":
        readers = _example_readers(config, encode, objective, seq_len)
        open_one = functools.partial(_open_examples, readers=readers, skip_bad=config.bad_records == "skip")
    rows = batch_size // process_count
    parts = [split(source, config, open_one(source)) for source in config.sources]
    validation_parts = []
    if config.validation_files:
        source = validation_config(config)
        try:
            opened = open_one(source)
        except DataError as error:
            raise DataError(str(error).replace("data.files", "data.validation_files")) from None
        validation_parts = [validation_part(source, opened, parts)]
    return Data(
        config,
        parts,
        validation_parts,
        encode,
        objective=objective,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        local_rows=range(process_index * rows, (process_index + 1) * rows),
        peers=peers,
    )


def _example_readers(
    config: DataConfig, encode: Encoder, objective: Objective, seq_len: int
) -> tuple[RecordFormats, ExampleEncoder]:
    """Returns the reader of a finetuning run's records, and their encoder."""
    template = None
    try:
        template = chat_template(encode.tokenizer, config.template or None)
    except TokenizerError:
        if config.template or encode.tokenizer.chat_template is not None:
            raise
    if objective == "classify" and not config.labels:
        raise ConfigError("data.labels is empty; list the class names in it, in the order of their ids")
    formats = RecordFormats(objective, config.sources[0].field, template is not None, config.labels)
    return formats, ExampleEncoder(encode, template, objective, seq_len, config.too_long)


def _open_examples(
    config: SourceConfig, readers: tuple[RecordFormats, ExampleEncoder], skip_bad: bool
) -> ExampleSource:
    formats, encode = readers
    formats = dataclasses.replace(formats, field=config.field)
    source_type = MismatchedSource if formats.objective == "kto" else ExampleSource
    source = source_type(config, open_records(config, rows=True), formats, encode)
    try:
        source.detect_format(skip_bad)
    except BadRecord as bad:
        raise DataError(
            bad_record_error(bad.message) if bad.reason != "unknown record format" else bad.message
        ) from None
    return source


def train_texts(config: DataConfig) -> Iterator[str]:
    """Yields the training documents in file order, for training a tokenizer.

    Raises:
      DataError: if there is none, or one cannot be read.
    """
    for source in config.sources:
        records = open_records(source)
        names = [file.name for file in records.files]
        validation = validation_records(names, records.counts, config.source_validation_fraction)
        for index in TrainingRecords(len(records), validation):
            try:
                yield records.text(index)
            except BadRecord as bad:
                if config.bad_records == "fail":
                    raise DataError(bad_record_error(bad.message)) from None
