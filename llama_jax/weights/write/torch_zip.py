"""Computes the layout of a file for `torch.load`, with or without mmap, before any tensor data is available.

The format is that of `torch.save`: a zip archive of uncompressed entries: a pickle (protocol 2) that
describes the tensors, and one entry per tensor with its bytes, aligned to 64 bytes.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llama_jax.weights.source import FLOAT_DTYPES
from llama_jax.weights.torch_pickle import STORAGES
from llama_jax.weights.zip_directory import (
    CENTRAL,
    CENTRAL_MAGIC,
    END,
    END64,
    END64_MAGIC,
    END_MAGIC,
    LOCAL,
    LOCAL_MAGIC,
    LOCATOR64,
    LOCATOR64_MAGIC,
    ZIP64_EXTRA_ID,
    ZIP64_SENTINEL,
)

_FOLDER = "consolidated"  # as in Meta's files
_ALIGNMENT = 64
_PADDING_EXTRA_ID = 0x4246  # "FB", as in torch
_ZIP_VERSION = 45  # the first zip version with zip64
_DATE = 1 << 5 | 1  # 1980-01-01, so that the same tensors give the same file


class TensorSpec(NamedTuple):
    """Name, shape and dtype (a key of `FLOAT_DTYPES`) of a tensor to write."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOAT_DTYPES[self.dtype].itemsize


class _Entry(NamedTuple):
    name: bytes
    offset: int  # of the local header
    header_size: int
    size: int
    data: bytes | None  # None for tensors


class Layout:
    """The layout of the file.

    Attributes:
      size: file size in bytes.
      offsets: file offset of the data of each tensor.
      fixed: (offset, bytes) of everything that does not depend on the tensor data.
    """

    def __init__(self, tensors: Sequence[TensorSpec]) -> None:
        self._entries: list[_Entry] = []
        self._end = 0
        self._add("data.pkl", _pickle(tensors))
        self._add("byteorder", b"little")
        for number, tensor in enumerate(tensors):
            self._add(f"data/{number}", tensor.nbytes)
        self._add("version", b"3\n")
        self.offsets = [entry.offset + entry.header_size for entry in self._entries if entry.data is None]
        self.size = self._end + len(self._directory([0] * len(tensors)))
        self.fixed = [
            (entry.offset, _header(entry, zlib.crc32(entry.data)) + entry.data)
            for entry in self._entries
            if entry.data is not None
        ]

    def _add(self, name: str, content: bytes | int) -> None:
        full_name = f"{_FOLDER}/{name}".encode()
        data = content if isinstance(content, bytes) else None
        size = len(content) if isinstance(content, bytes) else content
        unpadded = LOCAL.size + len(full_name) + len(_zip64_extra(size, size)) + 4
        header_size = unpadded + -(self._end + unpadded) % _ALIGNMENT
        self._entries.append(_Entry(full_name, self._end, header_size, size, data))
        self._end += header_size + size

    def finish(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yields (offset, bytes) of everything that depends on the tensor data.

        Args:
          checksums: the CRC-32 of the data of each tensor.
        """
        for entry, crc in self._with_checksums(checksums):
            if entry.data is None:
                yield entry.offset, _header(entry, crc)
        yield self._end, self._directory(checksums)

    def _directory(self, checksums: Sequence[int]) -> bytes:
        out = bytearray()
        for entry, crc in self._with_checksums(checksums):
            extra = _zip64_extra(entry.size, entry.size, entry.offset)
            size, offset = min(entry.size, ZIP64_SENTINEL), min(entry.offset, ZIP64_SENTINEL)
            lengths = (len(entry.name), len(extra))
            fields = (_ZIP_VERSION, _ZIP_VERSION, 0, 0, 0, _DATE, crc, size, size, *lengths)
            out += CENTRAL.pack(CENTRAL_MAGIC, *fields, 0, 0, 0, 0, offset) + entry.name + extra
        size, count = len(out), len(self._entries)
        totals = (count, count, size, self._end)
        out += END64.pack(END64_MAGIC, END64.size - 12, _ZIP_VERSION, _ZIP_VERSION, 0, 0, *totals)
        out += LOCATOR64.pack(LOCATOR64_MAGIC, 0, self._end + size, 1)
        count, size, end = min(count, 0xFFFF), min(size, ZIP64_SENTINEL), min(self._end, ZIP64_SENTINEL)
        out += END.pack(END_MAGIC, 0, 0, count, count, size, end, 0)
        return bytes(out)

    def _with_checksums(self, checksums: Sequence[int]) -> Iterator[tuple[_Entry, int]]:
        """Yields every entry with its CRC-32."""
        remaining = iter(checksums)
        for entry in self._entries:
            yield entry, next(remaining) if entry.data is None else zlib.crc32(entry.data)


def _header(entry: _Entry, crc: int) -> bytes:
    """An entry's local header, padded for alignment."""
    zip64 = _zip64_extra(entry.size, entry.size)
    padding = entry.header_size - LOCAL.size - len(entry.name) - len(zip64) - 4
    extra = zip64 + struct.pack("<2H", _PADDING_EXTRA_ID, padding) + b"Z" * padding
    size = min(entry.size, ZIP64_SENTINEL)
    fields = (_ZIP_VERSION, 0, 0, 0, _DATE, crc, size, size, len(entry.name), len(extra))
    return LOCAL.pack(LOCAL_MAGIC, *fields) + entry.name + extra


def _zip64_extra(*values: int) -> bytes:
    """The zip64 extra field with the values that do not fit in 32 bits; empty if all do."""
    large = [value for value in values if value >= ZIP64_SENTINEL]
    return struct.pack(f"<2H{len(large)}Q", ZIP64_EXTRA_ID, 8 * len(large), *large) if large else b""


def _pickle(tensors: Sequence[TensorSpec]) -> bytes:
    """The pickle of a dict from name to contiguous tensor; tensor i uses storage i."""
    items = b"".join(
        _pickle_string(tensor.name) + _pickle_tensor(tensor, index) for index, tensor in enumerate(tensors)
    )
    return b"\x80\x02}(" + items + b"u."


def _pickle_tensor(tensor: TensorSpec, index: int) -> bytes:
    """A call of `torch._utils._rebuild_tensor_v2` with a storage, an offset, sizes and strides."""
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    storage = b"(" + _pickle_string("storage") + _pickle_global("torch", STORAGES[tensor.dtype])
    storage += (
        _pickle_string(str(index)) + _pickle_string("cpu") + _pickle_int(math.prod(tensor.shape)) + b"tQ"
    )
    hooks = _pickle_global("collections", "OrderedDict") + b")R"
    view = _pickle_int(0) + _pickle_ints(tensor.shape) + _pickle_ints(strides)
    rebuild = _pickle_global("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + storage + view + b"\x89" + hooks + b"tR"


def _pickle_global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _pickle_string(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _pickle_ints(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_pickle_int, values)) + b"t"


def _pickle_int(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
