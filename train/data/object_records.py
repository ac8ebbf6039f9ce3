"""Reads ArrayRecord files by ranges: array_record's own reader needs files on a disk.

Layout: riegeli's doc/riegeli_records_file_format.md, and array_record's array_record_reader.cc. A file is a
sequence of chunks, with a block header of 24 bytes at every multiple of 64 KiB in between. A chunk of simple
records holds their sizes and their bytes, each compressed or not. The chunk in the last block says where the
footer is, which lists the offset and the number of records of every chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .files import File

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_MAGIC = 0x71930E704FDAE05E
_RECORDS = ord("r")
_CODECS = {ord("z"): "zstd", ord("b"): "brotli", ord("s"): "snappy"}
_MAX_DECODED = 1 << 30  # bytes
_AHEAD = 1 << 16  # bytes that are read with a chunk's header


class _Chunk(NamedTuple):
    """A chunk of records: their bytes one after the other, and where each ends."""

    data: bytes
    ends: np.ndarray

    def record(self, index: int) -> bytes:
        return self.data[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]


class ObjectRecords:
    """The records of one ArrayRecord file, each of which costs about one ranged read.

    Args:
      file: the file.

    Raises:
      ValueError: if it is not an ArrayRecord file, or one with chunks of another type.
    """

    def __init__(self, file: File) -> None:
        self._file = file
        last = (file.nbytes - 1) // _BLOCK * _BLOCK
        postscript = _message(self._chunk(last).record(0))
        if postscript.get(2) != _MAGIC or not 0 < postscript.get(1, 0) < file.nbytes:
            raise ValueError("not an ArrayRecord file")
        footer = self._chunk(postscript[1])
        entries = [_message(footer.record(i)) for i in range(1, len(footer.ends))]
        offsets = [entry.get(1, 0) for entry in entries]
        counts = [entry.get(3, 0) for entry in entries]
        if any(not 0 <= value < file.nbytes for value in (*offsets, *counts)) or offsets != sorted(offsets):
            raise ValueError("its footer does not fit it")
        self._offsets = np.array(offsets, np.int64)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._sizes = np.diff(np.append(self._offsets, postscript[1]))  # of a chunk, with block headers
        self._lock, self._latest = threading.Lock(), (-1, _Chunk(b"", np.zeros(0, np.int64)))

    def num_records(self) -> int:
        """Returns the number of records."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: list[int]) -> list[bytes]:
        """Returns some records; of consecutive ones in a chunk, that is read once."""
        return [self._read(index) for index in indices]

    def _read(self, index: int) -> bytes:
        number = int(np.searchsorted(self._ends, index, side="right"))
        with self._lock:
            known, chunk = self._latest
        if known != number:
            chunk = self._chunk(int(self._offsets[number]), int(self._sizes[number]))
            with self._lock:
                self._latest = number, chunk
        return chunk.record(index - (int(self._ends[number - 1]) if number else 0))

    def _chunk(self, offset: int, size: int = _AHEAD) -> _Chunk:
        """Reads the chunk at an offset; `size` is a guess of its size, with block headers."""
        raw = self._bytes(offset, max(size, _CHUNK_HEADER + 2 * _BLOCK_HEADER))
        header = raw[:_CHUNK_HEADER]
        data_size = int.from_bytes(header[8:16], "little")
        if len(header) < _CHUNK_HEADER or header[24] != _RECORDS or data_size > self._file.nbytes:
            raise ValueError("it has a chunk that is none of simple records")
        count = int.from_bytes(header[25:32], "little")
        needed = _CHUNK_HEADER + data_size
        if len(raw) < needed:
            blocks = (offset % _BLOCK + needed) // (_BLOCK - _BLOCK_HEADER) + 1
            raw = self._bytes(offset, needed + blocks * _BLOCK_HEADER)
        data = raw[_CHUNK_HEADER:needed]
        if len(data) < data_size or not data:
            raise ValueError("it is truncated")
        codec = data[0]
        sizes_length, start = _varint(data, 1)
        sizes = _decompress(data[start : start + sizes_length], codec)
        values = _decompress(data[start + sizes_length :], codec)
        lengths = list(_varints(sizes))
        if max(lengths, default=0) > len(values):
            raise ValueError("a record is longer than its chunk")
        ends = np.cumsum(lengths, dtype=np.int64)
        if len(ends) != count or (count and ends[-1] != len(values)):
            raise ValueError("a chunk's records do not add up")
        return _Chunk(values, ends)

    def _bytes(self, offset: int, size: int) -> bytes:
        """Reads bytes of the file without the block headers among them."""
        size = min(size, self._file.nbytes - offset)
        raw = self._file.read(offset, size)
        parts, position = [], offset
        while position < offset + size:
            if position % _BLOCK == 0:
                position += _BLOCK_HEADER
            end = min((position // _BLOCK + 1) * _BLOCK, offset + size)
            parts.append(raw[position - offset : end - offset])
            position = end
        return b"".join(parts)


def _decompress(data: bytes, codec: int) -> bytes:
    if not codec:
        return data
    if codec not in _CODECS:
        raise ValueError(f"unknown compression {codec}")
    import pyarrow

    size, start = _varint(data, 0)
    if size > _MAX_DECODED:
        raise ValueError(f"a chunk of {size} bytes")
    return pyarrow.decompress(data[start:], size, _CODECS[codec], asbytes=True) if size else b""


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns a varint, and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varints(data: bytes) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _message(data: bytes) -> dict[int, Any]:
    """Returns the integer fields of a protocol buffer; of nested messages only the first level."""
    fields: dict[int, Any] = {}
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        if key & 7 == 0:
            fields[key >> 3], position = _varint(data, position)
        elif key & 7 == 1:
            fields[key >> 3], position = int.from_bytes(data[position : position + 8], "little"), position + 8
        elif key & 7 == 2:
            length, position = _varint(data, position)
            fields[key >> 3], position = data[position : position + length], position + length
        else:
            raise ValueError("a protocol buffer of another kind")
    return fields
