"""A run's sources, each split into training and validation records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from llama_jax.errors import DataError
from llama_jax.storage import as_path

from ..config.data import DataConfig, SourceConfig
from .examples import ExampleSource
from .lanes import format_counts
from .prepared import PreparedSource
from .records import Blocks
from .source import Source
from .splitting import TrainingRecords, validation_records


@dataclasses.dataclass(frozen=True)
class Part:
    """One source, split.

    Attributes:
      config: its section of the configuration.
      source: its documents or examples.
      train_index, validation_index: the record numbers of each split.
      blocks: the blocks that are cheap to read together, counting training records alone; or None.
      reference: precomputed reference log-probabilities, as in `Examples`.
    """

    config: SourceConfig
    source: Source | ExampleSource
    train_index: Sequence[int]
    validation_index: Sequence[int] | np.ndarray
    blocks: Blocks | None
    reference: np.ndarray | None = None


def split(config: SourceConfig, data: DataConfig, source: Source | ExampleSource) -> Part:
    """Splits one source.

    Raises:
      DataError: if nothing is left to train on.
    """
    if isinstance(source, PreparedSource):
        return _split_when_prepared(config, data, source)
    validation = validation_records(source.names, source.counts, data.source_validation_fraction)
    blocks = source.blocks
    if blocks is not None:  # count only training records
        ends = np.searchsorted(validation, np.cumsum(blocks.sizes))
        blocks = dataclasses.replace(blocks, sizes=blocks.sizes - np.diff(ends, prepend=0))
    part = Part(config, source, TrainingRecords(len(source), validation), validation, blocks)
    if not len(part.train_index):
        raise DataError(no_text_message(part, data, {}))
    return part


def _split_when_prepared(config: SourceConfig, data: DataConfig, source: PreparedSource) -> Part:
    if source.validation_fraction != data.source_validation_fraction:
        now = "data.validation_files" if data.validation_files else str(data.validation_fraction)
        raise DataError(
            f"{config.title} was split when it was prepared, with data.validation_fraction = "
            f"{source.validation_fraction}, and the run has {now}; use the same, or prepare the text again"
        )
    part = Part(config, source, source.train_index, source.validation_index, source.blocks)
    if not len(part.train_index):
        raise DataError(no_text_message(part, data, {}))
    return part


def no_text_message(part: Part, config: DataConfig, skipped: Mapping[str, int]) -> str:
    """Returns the error message for a source without usable records."""
    records = len(part.source)
    if not records:
        return f"the files that {part.config.title!r} matches have no text; use files that do"
    why = f" (skipped: {format_counts(skipped)})" if isinstance(part.source, ExampleSource) else ""
    if config.bad_records == "skip":
        why += '; data.bad_records is "skip": set it to "fail" to see the first error'
    return f"none of the {records} records of {part.config.title!r} has usable text{why}"


def validation_config(data: DataConfig) -> SourceConfig:
    """Returns the source of `data.validation_files`, with the format and field of the first."""
    return dataclasses.replace(data.sources[0], files=data.validation_files, exclude=(), weight=1.0)


def validation_part(config: SourceConfig, source: Source | ExampleSource, parts: Sequence[Part]) -> Part:
    """Returns a part with only validation records.

    Raises:
      DataError: if it has no records, or shares a file with a part that is trained on.
    """
    if not len(source):
        raise DataError(
            f"the files that data.validation_files = {config.title!r} matches have no text; use other files"
        )
    trained = {path for part in parts for path in _paths(part.source)}
    if shared := sorted(_paths(source) & trained):
        raise DataError(
            f"{shared[0]} is in data.validation_files and in the training files; exclude it from one of them"
        )
    return Part(config, source, (), range(len(source)), None)


def _paths(source: Source | ExampleSource) -> set[str]:
    records = getattr(source, "records", None)  # a folder of token ids has none
    return {str(as_path(file.path).resolve()) for file in records.files} if records else set()
