"""The output layout that each format's planner computes before any tensor is read.

The layout of every format follows from the tensors' shapes and dtypes, so a planner only plans; `run` then
writes the data, several tensors at a time and in any order, and can resume an interrupted write.
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
    """The location of a tensor, or of a slice of one, in the output.

    Attributes:
      file: name of the data file, relative to the output directory.
      offset: byte offset in the file. (With `Plan.store`, both are defined by the store.)
      nbytes: encoded size in bytes.
      leaf: the tensor, as for `Tensors.read(leaf, layer)`.
      layer: layer index; None for tensors outside of the layers.
      encode: maps the tensor (Hugging Face's layout, any float dtype) to a C-contiguous array of exactly
        `nbytes` bytes. Must be thread-safe.
      index: the slice of the tensor in this file (Meta's shards), applied before `encode`; None is all of it.
    """

    file: str
    offset: int
    nbytes: int
    leaf: Leaf
    layer: int | None
    encode: Callable[[np.ndarray], np.ndarray]
    index: tuple[slice, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Blob:
    """Bytes that do not depend on tensor data, such as a header, and their location."""

    file: str
    offset: int
    data: bytes


class Store(Protocol):
    """The destination of regions; both methods are thread-safe."""

    def write(self, region: Region, data: np.ndarray) -> None:
        """Writes the result of `region.encode`."""

    def sync(self) -> None:
        """Flushes all earlier writes to disk."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The layout of an output, without tensor data.

    Attributes:
      format: the checkpoint format.
      single_file: the output is the only file in `files`, not a directory.
      files: name and size in bytes of each data file.
      blobs: headers.
      extras: complete small files: config.json, tokenizer files, the index.
      regions: the tensors, in the order to write them. The slices of one tensor are consecutive, so that it
        is read once.
      finish: given the CRC-32 of each region, in the order of `regions`, returns the blobs that depend on
        them (a zip directory); None if there are none, in which case no CRC is computed.
      store: opens the store in the output directory; None is the data files in `files`.
    """

    format: Format
    single_file: bool
    files: Mapping[str, int]
    blobs: Sequence[Blob]
    extras: Mapping[str, bytes]
    regions: Sequence[Region]
    finish: Callable[[Sequence[int]], Iterable[Blob]] | None = None
    store: Callable[[Path], AbstractContextManager[Store]] | None = None
