"""Parses GGUF headers, with every count, length and offset checked against the file size.

The `gguf` package's own reader does not check them. Layout: ggml-org/ggml, docs/gguf.md.
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

# Value types by number: `struct` codes of the scalars, then the two other types.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6

# The minimum size of an entry: a count that cannot fit in the file is refused before anything is allocated.
_MIN_ENTRY_BYTES = {"metadata fields": 8 + 4 + 1, "tensors": 8 + 4 + 8 + 4 + 8}
_MAX_DIMS = 4
_MAX_NAME = 65_535

# The tensor types that gguf.quants can dequantize.
SUPPORTED_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)


class Header(NamedTuple):
    """A GGUF file's metadata fields and tensor table."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path, with_tensors: bool = True) -> Header:
    """Reads and checks one file's metadata, and its tensor table.

    Raises:
      CheckpointError: if the file is missing, truncated or malformed, or a tensor has an unsupported type.
    """
    with open_file(path) as (file, size):
        return _Parser(path, file, size).header(with_tensors)


def without_tensors(path: Path) -> bytes:
    """Returns a GGUF file with one file's metadata, its vocabulary among them, and no tensors.

    Raises:
      CheckpointError: as `read_header`.
    """
    with open_file(path) as (file, size):
        parser = _Parser(path, file, size)
        parser.header(with_tensors=False)
        file.seek(0)
        data = file.read(size - parser.remaining)
    return data[:8] + bytes(8) + data[16:]  # magic and version, the number of tensors, the fields


class _Parser:
    """A cursor over the header that never reads past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.remaining = size
        self.size = size

    def header(self, with_tensors: bool) -> Header:
        if self.read(4, "the magic number") != MAGIC:
            raise self.error(f"not a GGUF file: it does not begin with {MAGIC.decode()}; give another file")
        version = self.scalar("I", "the version")
        if version not in (2, 3):
            big_endian = version in (2 << 24, 3 << 24)
            version, suffix = (version >> 24, " (big-endian)") if big_endian else (version, "")
            raise self.error(
                f"GGUF version {version}{suffix} is not supported, only little-endian versions 2 and 3; "
                "convert it with a current llama.cpp"
            )
        tensors, fields = self.count("tensors"), self.count("metadata fields")
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            key = self.name("a metadata key")
            if key in metadata:
                raise self.error(
                    f"metadata field {quote(key)} appears twice; the file is malformed, download it again"
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
                raise self.error(
                    f"tensor {quote(name)} appears twice; the file is malformed, download it again"
                )
            tensors[name] = self.tensor(name, alignment)
        header = self.size - self.remaining
        data = -(-header // alignment) * alignment
        tensors = {name: dataclasses.replace(t, offset=data + t.offset) for name, t in tensors.items()}
        end = max((t.offset + t.nbytes for t in tensors.values()), default=0)
        if end > self.size:
            name = max(tensors, key=lambda name: tensors[name].offset + tensors[name].nbytes)
            raise self.error(
                f"tensor {quote(name)} ends at byte {end} but the file has {self.size} bytes; it is "
                "truncated or malformed, download it again"
            )
        check_overlaps(self.path, ((t.offset, t.offset + t.nbytes, name) for name, t in tensors.items()))
        return tensors

    def tensor(self, name: str, alignment: int) -> TensorInfo:
        """Reads one row of the tensor table; the returned offset is relative to the start of the data."""
        item = f"tensor {quote(name)}"
        rank = self.scalar("I", item)
        if not 1 <= rank <= _MAX_DIMS:
            raise self.error(f"{item} has {rank} dimensions; GGUF allows 1 to {_MAX_DIMS}")
        shape = tuple(self.scalar("Q", item) for _ in range(rank))[::-1]
        number, offset = self.scalar("I", item), self.scalar("Q", item)
        try:
            kind = GGMLQuantizationType(number).name
        except ValueError:
            kind = f"number {number}"
        if kind not in SUPPORTED_TYPES:
            raise self.error(
                f"{item} has type {kind}, which is not supported; requantize to one of "
                f"{', '.join(SUPPORTED_TYPES)}"
            )
        values_per_block, bytes_per_block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if not math.prod(shape) or shape[-1] % values_per_block:
            raise self.error(
                f"{item} has shape {shape}; rows of {kind} must be positive multiples of {values_per_block}"
            )
        if offset % alignment:
            raise self.error(f"{item} is at offset {offset}, not a multiple of the alignment {alignment}")
        nbytes = math.prod(shape) // values_per_block * bytes_per_block
        return TensorInfo(shape, kind, nbytes, self.path, offset)

    def value(self, key: str) -> Any:
        """Reads a field's type and value."""
        item = f"metadata field {quote(key)}"
        kind = self.scalar("I", item)
        if kind == _STRING:
            return self.string(item)
        if kind == _ARRAY:
            return self.array(item)
        if kind not in _SCALARS:
            raise self.error(f"{item} has the unknown type {kind}; the file is malformed, download it again")
        value = self.scalar(_SCALARS[kind], item)
        return float(str(np.float32(value))) if kind == _FLOAT32 else value

    def array(self, item: str) -> list[str] | np.ndarray:
        kind, count = self.scalar("I", item), self.scalar("Q", item)
        if kind == _STRING:
            if count > self.remaining // 8:
                raise self.error(f"{item} claims {count} strings but only {self.remaining} bytes are left")
            return [self.string(item) for _ in range(count)]
        if kind not in _SCALARS:
            raise self.error(f"{item} is an array of type {kind}, which is not supported")
        dtype = np.dtype(_SCALARS[kind]).newbyteorder("<")
        raw = self.read(count * dtype.itemsize, item)
        return np.frombuffer(raw, "u1") != 0 if kind == _BOOL else np.frombuffer(raw, dtype)

    def count(self, item: str) -> int:
        count = self.scalar("Q", f"the number of {item}")
        if count > self.remaining // _MIN_ENTRY_BYTES[item]:
            raise self.error(f"the header claims {count} {item} but only {self.remaining} bytes are left")
        return count

    def name(self, item: str) -> str:
        name = self.string(item, _MAX_NAME)
        if not name:
            raise self.error(f"{item} is empty; the file is malformed, download it again")
        return name

    def string(self, item: str, limit: int | None = None) -> str:
        length = self.scalar("Q", item)
        if limit is not None and length > limit:
            raise self.error(f"{item} is {length} bytes long; the longest allowed is {limit}")
        try:
            return self.read(length, item).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{item} is not UTF-8: {error.reason} at byte {error.start}") from error

    def scalar(self, code: str, item: str) -> Any:
        code = "<" + code
        return struct.unpack(code, self.read(struct.calcsize(code), item))[0]

    def read(self, count: int, item: str) -> bytes:
        if count > self.remaining:
            raise self.error(
                f"truncated or malformed: {item} needs {count} bytes at byte {self.size - self.remaining} "
                f"but {self.remaining} are left of {self.size}; download it again"
            )
        self.remaining -= count
        data = self.file.read(count)
        if len(data) != count:
            raise self.error(f"the file changed while {item} was read")
        return data

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")
