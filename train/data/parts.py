"""A run's sources, each split into what is trained on and what is held out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.errors import DataError

from ..config.data import DataConfig, SourceConfig
from .examples import ExampleSource
from .lanes import counted
from .records import held_out
from .source import Source


@dataclasses.dataclass(frozen=True)
class Part:
    """One source, split; with what of its records was computed beforehand, as `Examples` takes it."""

    config: SourceConfig
    source: Source | ExampleSource
    train: np.ndarray
    held_out: np.ndarray
    blocks: np.ndarray | None
    reference: np.ndarray | None = None


def split(config: SourceConfig, data: DataConfig, source: Source | ExampleSource) -> Part:
    """Splits one source.

    Raises:
      DataError: if nothing is left to train on.
    """
    held = held_out(source.key, data.share)
    blocks = source.blocks
    if blocks is not None:  # as many of each block as are trained on
        block_of = np.repeat(np.arange(len(blocks)), blocks)
        blocks = np.bincount(block_of[~held], minlength=len(blocks))
    part = Part(config, source, np.flatnonzero(~held), np.flatnonzero(held), blocks)
    if not len(part.train):
        raise DataError(empty(part, data, {}))
    return part


def empty(part: Part, config: DataConfig, skipped: Mapping[str, int]) -> str:
    """Returns what to say of a source without anything usable."""
    records = len(part.source.key)
    if not records:
        return f"the files that {part.config.files!r} matches hold no text; give files that do"
    why = f" (skipped: {counted(skipped)})" if isinstance(part.source, ExampleSource) else ""
    if config.bad_records == "skip":
        why += '; data.bad_records is "skip": set it to "fail" to see what is wrong with the first'
    return f"none of the {records} records of {part.config.files!r} holds usable text{why}"


def all_held_out(config: SourceConfig, source: Source | ExampleSource, parts: Sequence[Part]) -> Part:
    """Returns a part of which nothing is trained on, and which shares no file with the others."""
    if not len(source.key):
        raise DataError(
            f"the files that data.validation_files = {config.files!r} matches hold no text; give others"
        )
    trained = {path for part in parts for path in _paths(part.source)}
    if both := sorted(_paths(source) & trained):
        raise DataError(f"{both[0]} is in data.validation_files and trained on; exclude it from one of them")
    return Part(config, source, np.zeros(0, np.int64), np.arange(len(source.key)), None)


def _paths(source: Source | ExampleSource) -> set[str]:
    records = getattr(source, "records", None)  # a folder of token ids has none
    return {str(Path(file.path).resolve()) for file in records.files} if records else set()
