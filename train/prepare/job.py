"""What there is to prepare: the sources of a run's data, split, and cut into chunks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_jax.storage import StorePath
from llama_jax.tokenizer import Tokenizer

from ..config.data import DataConfig, SourceConfig
from ..data.encode import Encoder
from ..data.order import shuffle_seed
from ..data.parts import Part, split, validation_config, validation_part
from ..data.prepared import VERSION
from ..data.records import Blocks
from ..data.source import TextSource, open_records

Split = Literal["train", "validation"]
PLAN = "prepare.json"  # in the folder from the start: what it is made from
WORK = "work"  # in it until the end: what is not yet in shards
VALIDATION = "validation"  # subfolder with the documents of data.validation_files
_LEAST_CHUNK, _MOST_CHUNK, _CHUNKS = 16 << 20, 512 << 20, 4096  # bytes of text; how many between the two


@dataclasses.dataclass(frozen=True)
class Section:
    """One source, which becomes one folder of shards.

    Attributes:
      name: of the subfolder; empty for the folder itself.
      title: the source's globs.
      source: the text.
      records: number of records.
      validation: int64 [n], the sorted numbers of the validation records; the others are trained on.
      blocks: the blocks of training records that a run reads together, or None.
      seed: of the first epoch's order; None is the order of the files.
      validation_fraction: that the split was made with.
      chunk_records: number of records in a chunk; the last has fewer.
    """

    name: str
    title: str
    source: TextSource
    records: int
    validation: np.ndarray
    blocks: Blocks | None
    seed: int | None
    validation_fraction: float
    chunk_records: int

    @property
    def chunks(self) -> int:
        return -(-self.records // self.chunk_records)

    def chunk(self, number: int) -> range:
        """Returns the record numbers of a chunk."""
        first = number * self.chunk_records
        return range(first, min(first + self.chunk_records, self.records))

    def count(self, split: Split) -> int:
        """Returns the number of records of a split."""
        held_out = len(self.validation)
        return held_out if split == "validation" else self.records - held_out

    def is_validation(self, records: np.ndarray) -> np.ndarray:
        """Returns bool [n]: which of the sorted, consecutive record numbers are held out."""
        first, last = np.searchsorted(self.validation, [records[0], records[-1] + 1])
        return np.isin(records, self.validation[first:last])

    def ranks(self, records: np.ndarray, split: Split) -> np.ndarray:
        """Returns the numbers of records, int64 [n], within their split."""
        before = np.searchsorted(self.validation, records)
        return before if split == "validation" else records - before

    def records_at(self, ranks: np.ndarray, split: Split) -> np.ndarray:
        """Returns the record numbers of a split's documents, int64 [n]: the inverse of `ranks`."""
        if split == "validation":
            return self.validation[ranks]
        trained_before = self.validation - np.arange(len(self.validation))
        return ranks + np.searchsorted(trained_before, ranks, side="right")


@dataclasses.dataclass(frozen=True)
class Job:
    """All sections, and how they are read.

    Attributes:
      out: the folder.
      sections: one per source, then one with the validation files if there are any.
      encode: the tokenizer's encoder.
      skip_bad: whether a bad record is skipped and counted, or ends the command.
      keep_duplicates: whether later copies of a document stay.
      settings: what determines the result, as in `PLAN`; JSON.
      store: where the folder goes, if not onto this disk.
    """

    out: Path
    sections: tuple[Section, ...]
    encode: Encoder
    skip_bad: bool
    keep_duplicates: bool
    settings: dict[str, Any]
    store: StorePath | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.encode.vocab_size <= 1 << 16 else "<u4")

    def chunks(self) -> list[tuple[int, int]]:
        """Returns (section, chunk) of every chunk."""
        return [(i, n) for i, section in enumerate(self.sections) for n in range(section.chunks)]

    def folder(self, section: int) -> Path:
        """Returns a section's folder of shards."""
        return self.out / self.sections[section].name

    def stored(self, section: int) -> StorePath | None:
        """Returns the place of a section's folder in the store, if there is one."""
        return None if self.store is None else self.store / self.sections[section].name

    def work(self, kind: str, *numbers: int | str) -> Path:
        """Returns the path without suffix of an intermediate result."""
        return self.out / WORK / kind / "-".join(f"{n:05}" if isinstance(n, int) else n for n in numbers)


def open_job(
    config: DataConfig, tokenizer: Tokenizer, out: Path, *, seed: int, keep_duplicates: bool = False
) -> Job:
    """Opens a run's data as the run does.

    Args:
      config: the `[data]` section.
      tokenizer: the model's.
      out: the folder to write.
      seed: the run's.
      keep_duplicates: as in `Job`.

    Raises:
      DataError: if there is no text, or it cannot be read.
    """
    encode = Encoder(tokenizer, config.parse_special)
    fraction = float(config.source_validation_fraction)
    sections, parts = [], []
    for i, chosen in enumerate(config.sources):
        source = _open_text(chosen, encode)
        part = split(chosen, config, source)
        seed_of_order = shuffle_seed(f"{seed}/{i}") if config.shuffle else None
        name = str(i) if config.mixture else ""
        held_out = np.asarray(part.validation_index, np.int64)
        sections.append(_section(name, source, part, held_out, seed_of_order, fraction))
        parts.append(part)
    if config.validation_files:
        chosen = validation_config(config)
        source = _open_text(chosen, encode)
        part = validation_part(chosen, source, parts)
        sections.append(_section(VALIDATION, source, part, np.zeros(0, np.int64), None, 0.0))
    settings = {
        "version": VERSION,
        "tokenizer": encode.fingerprint,
        "sources": [[s.name, s.title, s.source.fingerprint] for s in sections],
        "data.validation_fraction": fraction,
        "data.bad_records": config.bad_records,
        "data.shuffle": config.shuffle,
        "train.seed": seed if config.shuffle else None,
        "keep-duplicates": keep_duplicates,
    }
    return Job(out, tuple(sections), encode, config.bad_records == "skip", keep_duplicates, settings)


def _open_text(config: SourceConfig, encode: Encoder) -> TextSource:
    return TextSource(open_records(config), config.field, encode)


def _section(
    name: str,
    source: TextSource,
    part: Part,
    validation: np.ndarray,
    seed: int | None,
    validation_fraction: float,
) -> Section:
    records = len(source)
    wanted = min(max(source.nbytes // _CHUNKS, _LEAST_CHUNK), _MOST_CHUNK)
    return Section(
        name,
        part.config.title,
        source,
        records,
        validation,
        part.blocks,
        seed,
        validation_fraction,
        max(1, records * wanted // max(source.nbytes, 1)),
    )
