"""What a format's writer gives: all that is known of an output before a tensor has been read.

Every format's layout follows from the tensors' shapes and types, so a writer only plans; `run` then moves
the data, several tensors at a time and in any order, and can take up where an interrupted one stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_jax.weights.names import Format, Leaf


@dataclasses.dataclass(frozen=True)
class Region:
    """One tensor's place in an output.

    Attributes:
      file: the data file's name, relative to the output's directory.
      offset: in it, in bytes. (`Plan.store` may give the two a meaning of its own.)
      nbytes: how many bytes it takes there.
      leaf: the tensor, read with `Tensors.read(leaf, layer)`.
      layer: its layer; None outside them.
      encode: turns what is read (Hugging Face's layout, any float dtype) into a C-contiguous array that has
        exactly `nbytes` bytes. Called from several threads.
      rows: of a file that holds one part of a tensor (Meta's shards), which rows or columns: taken from the
        array before `encode`; None for all of it.
    """

    file: str
    offset: int
    nbytes: int
    leaf: Leaf
    layer: int | None
    encode: Callable[[np.ndarray], np.ndarray]
    rows: tuple[slice, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bytes known beforehand, such as a header, and their place."""

    file: str
    offset: int
    data: bytes


class Store(Protocol):
    """Where regions are written; both methods are safe to call from several threads."""

    def write(self, region: Region, data: np.ndarray) -> None:
        """Puts what `region.encode` gave in the region's place."""

    def sync(self) -> None:
        """Returns when what was written before would survive a power failure."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """An output, all but its tensors.

    Attributes:
      format: the format's short name.
      single_file: the output is the one file in `files`, not a directory.
      files: the data files' names and sizes in bytes.
      pieces: headers.
      extras: small files, whole: config.json, the tokenizer's, an index.
      regions: the tensors, in the order to write them. The parts of one tensor follow each other, so that
        it is read once.
      finish: given the CRC-32 of each region's bytes, in the order of `regions`, the pieces that depend on
        them (a zip's directory); None where nothing does, and no CRC is then computed.
      store: opens, in the output's directory, what the regions go into; None for `files`.
    """

    format: Format
    single_file: bool
    files: Mapping[str, int]
    pieces: Sequence[Piece]
    extras: Mapping[str, bytes]
    regions: Sequence[Region]
    finish: Callable[[Sequence[int]], Iterable[Piece]] | None = None
    store: Callable[[Path], AbstractContextManager[Store]] | None = None
