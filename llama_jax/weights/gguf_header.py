"""Parses a GGUF file's header, with every count, length and offset checked against the file's size.

The `gguf` package's own reader trusts them all. Layout: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llama_jax.errors import CheckpointError
from llama_jax.weights.source import TensorInfo, check_overlaps, open_file, quote

MAGIC = b"GGUF"

# Value types by number, as `struct` and NumPy spell them: the scalars, then the two that are not.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6

# The fewest bytes that an entry can take: a count that cannot fit is refused before it is believed.
_SMALLEST = {"metadata fields": 8 + 4 + 1, "tensors": 8 + 4 + 8 + 4 + 8}
_MAX_DIMS = 4
_MAX_NAME = 65_535

# The tensor types that gguf.quants turns into f32.
SUPPORTED = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)


class Header(NamedTuple):
    """A GGUF file's metadata fields, and where its tensors lie."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf_metadata(path: str | Path) -> Mapping[str, Any]:
    """Reads a GGUF file's metadata fields alone.

    Returns:
      keys to str, bool, int, float (32-bit ones as the shortest decimal that gives them back), list of
      str, or one-dimensional NumPy array.

    Raises:
      CheckpointError: if the file is missing, truncated or malformed.
    """
    return _parse(Path(path), with_tensors=False).metadata


def read_gguf_header(path: str | Path) -> Header:
    """Reads and checks all of a GGUF file that comes before the tensors' data.

    Raises:
      CheckpointError: if the file is missing, truncated or malformed, or a tensor has a type that
        cannot be read.
    """
    return _parse(Path(path), with_tensors=True)


def _parse(path: Path, with_tensors: bool) -> Header:
    with open_file(path) as (file, size):
        return _Parser(path, file, size).header(with_tensors)


class _Parser:
    """A cursor over the header that never asks for bytes the file does not have."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.left = size
        self.size = size

    def header(self, with_tensors: bool) -> Header:
        if self.take(4, "the magic number") != MAGIC:
            raise self.error(f"not a GGUF file: it does not begin with {MAGIC.decode()}; give another")
        version = self.scalar("I", "the version")
        if version not in (2, 3):
            big_endian = version in (2 << 24, 3 << 24)
            version, why = (version >> 24, " and big-endian") if big_endian else (version, "")
            raise self.error(
                f"GGUF version {version}{why} cannot be read, only little-endian versions 2 and 3; "
                "convert it with a current llama.cpp"
            )
        tensors, fields = self.count("tensors"), self.count("metadata fields")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self.name("a metadata key")
            if key in metadata:
                raise self.error(
                    f"metadata field {quote(key)} appears twice; the file is malformed, get it again"
                )
            metadata[key] = self.value(key)
        return Header(metadata, self.tensors(tensors, metadata) if with_tensors else {})

    def tensors(self, count: int, metadata: Mapping[str, Any]) -> dict[str, TensorInfo]:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.error(f"general.alignment is {quote(str(alignment))}; it must be a power of 2")
        tensors: dict[str, TensorInfo] = {}
        for _ in range(count):
            name = self.name("a tensor's name")
            if name in tensors:
                raise self.error(f"tensor {quote(name)} appears twice; the file is malformed, get it again")
            tensors[name] = self.tensor(name, alignment)
        header = self.size - self.left
        data = -(-header // alignment) * alignment
        tensors = {name: dataclasses.replace(t, offset=data + t.offset) for name, t in tensors.items()}
        end = max((t.offset + t.nbytes for t in tensors.values()), default=0)
        if end > self.size:
            name = max(tensors, key=lambda name: tensors[name].offset + tensors[name].nbytes)
            raise self.error(
                f"tensor {quote(name)} ends at byte {end} but the file has {self.size} bytes; it is "
                "truncated or malformed, get it again"
            )
        check_overlaps(self.path, ((t.offset, t.offset + t.nbytes, name) for name, t in tensors.items()))
        return tensors

    def tensor(self, name: str, alignment: int) -> TensorInfo:
        """Reads one row of the tensors' table; the offset is still relative to the data's start."""
        where = f"tensor {quote(name)}"
        rank = self.scalar("I", where)
        if not 1 <= rank <= _MAX_DIMS:
            raise self.error(f"{where} has {rank} dimensions; GGUF allows 1 to {_MAX_DIMS}")
        shape = tuple(self.scalar("Q", where) for _ in range(rank))[::-1]
        number, offset = self.scalar("I", where), self.scalar("Q", where)
        try:
            kind = GGMLQuantizationType(number).name
        except ValueError:
            kind = f"number {number}"
        if kind not in SUPPORTED:
            raise self.error(
                f"{where} has type {kind}, which cannot be read; requantise to one of {', '.join(SUPPORTED)}"
            )
        values_per_block, bytes_per_block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if not math.prod(shape) or shape[-1] % values_per_block:
            raise self.error(
                f"{where} has shape {shape}; a row of {kind} is a positive multiple of {values_per_block}"
            )
        if offset % alignment:
            raise self.error(
                f"{where} is at offset {offset}, which is not a multiple of the alignment {alignment}"
            )
        nbytes = math.prod(shape) // values_per_block * bytes_per_block
        return TensorInfo(shape, kind, nbytes, self.path, offset)

    def value(self, key: str) -> Any:
        """Reads a field's type and value."""
        where = f"metadata field {quote(key)}"
        kind = self.scalar("I", where)
        if kind == _STRING:
            return self.string(where)
        if kind == _ARRAY:
            return self.array(where)
        if kind not in _SCALARS:
            raise self.error(f"{where} has the unknown type {kind}; the file is malformed, get it again")
        value = self.scalar(_SCALARS[kind], where)
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def array(self, where: str) -> list[str] | np.ndarray:
        kind, count = self.scalar("I", where), self.scalar("Q", where)
        if kind == _STRING:
            if count > self.left // 8:
                raise self.error(f"{where} claims {count} strings but only {self.left} bytes are left")
            return [self.string(where) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.error(f"{where} is an array of type {kind}, which cannot be read")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        raw = self.take(count * dtype.itemsize, where)
        return np.frombuffer(raw, "u1") != 0 if kind == _BOOL else np.frombuffer(raw, dtype)

    def count(self, what: str) -> int:
        count = self.scalar("Q", f"the number of {what}")
        if count > self.left // _SMALLEST[what]:
            raise self.error(f"the header claims {count} {what} but only {self.left} bytes are left")
        return count

    def name(self, where: str) -> str:
        name = self.string(where, _MAX_NAME)
        if not name:
            raise self.error(f"{where} is empty; the file is malformed, get it again")
        return name

    def string(self, where: str, limit: int | None = None) -> str:
        length = self.scalar("Q", where)
        if limit is not None and length > limit:
            raise self.error(f"{where} is {length} bytes long; the longest allowed is {limit}")
        try:
            return self.take(length, where).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error

    def scalar(self, code: str, where: str) -> Any:
        code = "<" + code
        return struct.unpack(code, self.take(struct.calcsize(code), where))[0]

    def take(self, count: int, where: str) -> bytes:
        if count > self.left:
            raise self.error(
                f"truncated or malformed: {where} needs {count} bytes at byte {self.size - self.left} but "
                f"{self.left} are left of {self.size}; get it again"
            )
        self.left -= count
        taken = self.file.read(count)
        if len(taken) != count:
            raise self.error(f"the file changed while {where} was read")
        return taken

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")
