"""Lays out a file that `torch.load` reads, mapped into memory or not, before any of its data is there.

It is what `torch.save` writes: a zip archive of uncompressed entries, among them a pickle (protocol 2) that
describes the tensors, and one with the bytes of each, which begins at a multiple of 64.
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
    FULL,
    LOCAL,
    LOCAL_MAGIC,
    LOCATOR64,
    LOCATOR64_MAGIC,
    ZIP64,
)

_FOLDER = "consolidated"  # Meta's own files have it
_ALIGNMENT = 64
_PADDING = 0x4246  # the id, "FB", of the extra field that torch pads with
_VERSION = 45  # of the zip format, the first with zip64
_DATE = 1 << 5 | 1  # 1980-01-01: the same tensors give the same file


class Stored(NamedTuple):
    """A tensor to be written: its name, shape, and dtype as `FLOAT_DTYPES` has it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOAT_DTYPES[self.dtype].itemsize


class _Entry(NamedTuple):
    name: bytes
    offset: int  # of its header
    header_size: int
    size: int
    data: bytes | None  # None for a tensor's


class Layout:
    """Where everything is in the file.

    Attributes:
      size: the file's, in bytes.
      offsets: where the bytes of each tensor begin.
      known: what does not depend on the tensors' bytes, each with its place.
    """

    def __init__(self, tensors: Sequence[Stored]) -> None:
        self._entries: list[_Entry] = []
        self._end = 0
        self._add("data.pkl", pickle_of(tensors))
        self._add("byteorder", b"little")
        for number, tensor in enumerate(tensors):
            self._add(f"data/{number}", tensor.nbytes)
        self._add("version", b"3\n")
        self.offsets = [entry.offset + entry.header_size for entry in self._entries if entry.data is None]
        self.size = self._end + len(self._directory([0] * len(tensors)))
        self.known = [
            (entry.offset, _header(entry, zlib.crc32(entry.data)) + entry.data)
            for entry in self._entries
            if entry.data is not None
        ]

    def _add(self, name: str, content: bytes | int) -> None:
        full_name = f"{_FOLDER}/{name}".encode()
        data = content if isinstance(content, bytes) else None
        size = len(content) if isinstance(content, bytes) else content
        least = LOCAL.size + len(full_name) + len(_wide(size, size)) + 4
        header_size = least + -(self._end + least) % _ALIGNMENT
        self._entries.append(_Entry(full_name, self._end, header_size, size, data))
        self._end += header_size + size

    def finish(self, checksums: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Yields the rest, each with its place.

        Args:
          checksums: the CRC-32 of each tensor's bytes.
        """
        for entry, crc in self._checked(checksums):
            if entry.data is None:
                yield entry.offset, _header(entry, crc)
        yield self._end, self._directory(checksums)

    def _directory(self, checksums: Sequence[int]) -> bytes:
        out = bytearray()
        for entry, crc in self._checked(checksums):
            extra = _wide(entry.size, entry.size, entry.offset)
            size, offset = min(entry.size, FULL), min(entry.offset, FULL)
            numbers = (_VERSION, _VERSION, 0, 0, 0, _DATE, crc, size, size, len(entry.name), len(extra))
            out += CENTRAL.pack(CENTRAL_MAGIC, *numbers, 0, 0, 0, 0, offset) + entry.name + extra
        size, count = len(out), len(self._entries)
        place = (count, count, size, self._end)
        out += END64.pack(END64_MAGIC, END64.size - 12, _VERSION, _VERSION, 0, 0, *place)
        out += LOCATOR64.pack(LOCATOR64_MAGIC, 0, self._end + size, 1)
        few = min(count, 0xFFFF)
        out += END.pack(END_MAGIC, 0, 0, few, few, min(size, FULL), min(self._end, FULL), 0)
        return bytes(out)

    def _checked(self, checksums: Sequence[int]) -> Iterator[tuple[_Entry, int]]:
        """Yields the entries with their checksums."""
        given = iter(checksums)
        for entry in self._entries:
            yield entry, next(given) if entry.data is None else zlib.crc32(entry.data)


def _header(entry: _Entry, crc: int) -> bytes:
    """What stands before an entry's bytes."""
    wide = _wide(entry.size, entry.size)
    padding = entry.header_size - LOCAL.size - len(entry.name) - len(wide) - 4
    extra = wide + struct.pack("<2H", _PADDING, padding) + b"Z" * padding
    size = min(entry.size, FULL)
    numbers = (_VERSION, 0, 0, 0, _DATE, crc, size, size, len(entry.name), len(extra))
    return LOCAL.pack(LOCAL_MAGIC, *numbers) + entry.name + extra


def _wide(*numbers: int) -> bytes:
    """The zip64 field for the numbers that are too large for their place; nothing if none is."""
    large = [number for number in numbers if number >= FULL]
    return struct.pack(f"<2H{len(large)}Q", ZIP64, 8 * len(large), *large) if large else b""


def pickle_of(tensors: Sequence[Stored]) -> bytes:
    """The pickle of a dict of contiguous tensors by name, tensor number i in storage number i."""
    items = b"".join(_text(tensor.name) + _tensor(tensor, number) for number, tensor in enumerate(tensors))
    return b"\x80\x02}(" + items + b"u."


def _tensor(tensor: Stored, number: int) -> bytes:
    """A call of torch's function that makes a tensor from a storage, an offset, sizes and strides."""
    strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
    kind, length = _global("torch", STORAGES[tensor.dtype]), _number(math.prod(tensor.shape))
    storage = b"(" + _text("storage") + kind + _text(str(number)) + _text("cpu") + length + b"tQ"
    hooks = _global("collections", "OrderedDict") + b")R"
    view = _number(0) + _numbers(tensor.shape) + _numbers(strides)
    return _global("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + view + b"\x89" + hooks + b"tR"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _numbers(numbers: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"


def _number(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    return b"\x8a\x08" + struct.pack("<q", number)
