"""A run's sources, each split into training and validation records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.errors import DataError

from ..config.data import DataConfig, SourceConfig
from .examples import ExampleSource
from .lanes import format_counts
from .records import Blocks, validation_mask
from .source import Source


@dataclasses.dataclass(frozen=True)
class Part:
    """One source, split.

    Attributes:
      config: its section of the configuration.
      source: its documents or examples.
      train_index, validation_index: int64 [n], the record numbers of each split.
      blocks: the blocks that are cheap to read together, counting training records alone; or None.
      reference: precomputed reference log-probabilities, as in `Examples`.
    """

    config: SourceConfig
    source: Source | ExampleSource
    train_index: np.ndarray
    validation_index: np.ndarray
    blocks: Blocks | None
    reference: np.ndarray | None = None


def split(config: SourceConfig, data: DataConfig, source: Source | ExampleSource) -> Part:
    """Splits one source.

    Raises:
      DataError: if nothing is left to train on.
    """
    is_validation = validation_mask(source.keys, data.source_validation_fraction)
    blocks = source.blocks
    if blocks is not None:  # count only training records
        block_of = np.repeat(np.arange(len(blocks.sizes)), blocks.sizes)
        sizes = np.bincount(block_of[~is_validation], minlength=len(blocks.sizes))
        blocks = dataclasses.replace(blocks, sizes=sizes)
    part = Part(config, source, np.flatnonzero(~is_validation), np.flatnonzero(is_validation), blocks)
    if not len(part.train_index):
        raise DataError(no_text_message(part, data, {}))
    return part


def no_text_message(part: Part, config: DataConfig, skipped: Mapping[str, int]) -> str:
    """Returns the error message for a source without usable records."""
    records = len(part.source.keys)
    if not records:
        return f"the files that {part.config.files!r} matches have no text; use files that do"
    why = f" (skipped: {format_counts(skipped)})" if isinstance(part.source, ExampleSource) else ""
    if config.bad_records == "skip":
        why += '; data.bad_records is "skip": set it to "fail" to see the first error'
    return f"none of the {records} records of {part.config.files!r} has usable text{why}"


def validation_part(config: SourceConfig, source: Source | ExampleSource, parts: Sequence[Part]) -> Part:
    """Returns a part with only validation records.

    Raises:
      DataError: if it has no records, or shares a file with a part that is trained on.
    """
    if not len(source.keys):
        raise DataError(
            f"the files that data.validation_files = {config.files!r} matches have no text; use other files"
        )
    trained = {path for part in parts for path in _paths(part.source)}
    if shared := sorted(_paths(source) & trained):
        raise DataError(
            f"{shared[0]} is in data.validation_files and in the training files; exclude it from one of them"
        )
    return Part(config, source, np.zeros(0, np.int64), np.arange(len(source.keys)), None)


def _paths(source: Source | ExampleSource) -> set[str]:
    records = getattr(source, "records", None)  # a folder of token ids has none
    return {str(Path(file.path).resolve()) for file in records.files} if records else set()
