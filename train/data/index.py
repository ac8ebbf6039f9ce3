"""The index of text and JSON files: where each record is, in 4.25 bytes a record, read through a memory map.

    header     4096 bytes: JSON, padded with spaces
    lengths    uint32 [records]
    bases      int64 [ceil(records / 64), 2]: the offset in its file of every 64th record, and how many of the
               gaps come before it
    gaps       int64 [gaps, 2]: a record after which bytes of its file are left out, and how many
    files      _FILE [files]
    sums       uint32: the CRC-32 of each 64 kB after the header

A record begins where the one before ends, but for gaps. Records of over 4 GB are cut: they are too long to be
used. A part of the index is verified by its sum when it is first used.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llama_jax.errors import DataError

from .pieces import Pieces

VERSION = 1
_HEADER_BYTES = 4096
_SUM_BYTES = 1 << 16
_STRIDE = 64  # records from one base to the next
_MAX_LENGTH = 0xFFFFFFFF
_FILE = np.dtype(
    [
        ("size", "<i8"),
        ("mtime_ns", "<i8"),
        ("read", "<i8"),  # bytes; of a compressed file, decompressed
        ("records", "<i8"),
        ("first", "<i8"),  # the offset of the first record
        ("digest", "V16"),  # of all that is read
        ("sample", "V16"),  # of samples of the file
        ("copy", "V16"),  # the key of its copy in the cache; 0 if there is none
    ]
)
_LAYOUT = {"lengths": "<u4", "bases": "<i8", "gaps": "<i8", "files": _FILE.str, "sums": "<u4"}
_WIDTH = {"bases": 2, "gaps": 2}


class DamagedIndexError(Exception):
    """An index whose bytes are not those that were written."""


class Index:
    """An index: of all records of some files.

    Attributes:
      path: of its file; None if it is in memory.
      files: [files], a row of `_FILE` for each file.
      counts: int64 [files], number of records per file.
      nbytes: of all records together.
    """

    def __init__(self, path: Path | None = None, data: bytes = b""):
        """Opens the index at `path`, or the one that `data` is.

        Raises:
          DamagedIndexError: if it is none, or one of another version.
          OSError: if it cannot be read.
        """
        self.path = path
        self._data = data
        self._bytes = np.frombuffer(data, np.uint8) if path is None else np.memmap(path, np.uint8, "r")
        header = _read_header(self._bytes)
        self.nbytes: int = header["nbytes"]
        self._sections = {name: self._section(name, *header[name]) for name in _LAYOUT}
        sums = self._sections["sums"]
        if hashlib.blake2b(sums.tobytes(), digest_size=16).hexdigest() != header["sums_digest"]:
            raise DamagedIndexError
        self._verified = np.zeros(len(sums), bool) if path else np.ones(len(sums), bool)
        self.files = self._read("files", 0, len(self._sections["files"]))
        self.counts = self.files["records"].astype(np.int64)

    def __reduce__(self) -> tuple[type[Index], tuple[Path | None, bytes]]:
        return Index, (self.path, self._data)  # a worker process maps the file itself

    def __len__(self) -> int:
        return len(self._sections["lengths"])

    @functools.cached_property
    def _firsts(self) -> np.ndarray:
        return np.cumsum(self.counts) - self.counts

    def span(self, file: int, record: int) -> tuple[int, int]:
        """Returns the offset and the length of a record, numbered across all files, in its file.

        Raises:
          DataError: if this part of the index is damaged.
        """
        try:
            base, first = record // _STRIDE, int(self._firsts[file])
            bases = self._read("bases", base, base + 2)
            after, (start, gap) = base * _STRIDE, bases[0].tolist()
            if after < first:
                after, start = first, int(self.files["first"][file])
            lengths = self._read("lengths", after, record + 1)
            next_gap = int(bases[1, 1]) if len(bases) > 1 else len(self._sections["gaps"])
            gaps = self._read("gaps", gap, next_gap)
        except DamagedIndexError:
            raise DataError(
                f"{self.path}, the index of the data, is damaged; remove it, and start again"
            ) from None
        between = gaps[(gaps[:, 0] >= after) & (gaps[:, 0] < record), 1]
        return start + int(lengths[:-1].sum(dtype=np.int64)) + int(between.sum()), int(lengths[-1])

    def _section(self, name: str, start: int, count: int) -> np.ndarray:
        kind, width = _FILE if name == "files" else np.dtype(_LAYOUT[name]), _WIDTH.get(name, 1)
        end = start + count * width * kind.itemsize
        if min(start, count) < 0 or end > len(self._bytes):
            raise DamagedIndexError
        section = self._bytes[start:end].view(kind)
        return section.reshape(-1, width) if width > 1 else section

    def _read(self, name: str, start: int, end: int) -> np.ndarray:
        """Returns entries of a section, verified.

        Raises:
          DamagedIndexError: if a sum does not fit.
        """
        found = self._sections[name][start:end]
        if self.path is not None and len(found):
            offset = found.ctypes.data - self._bytes.ctypes.data - _HEADER_BYTES
            for i in range(offset // _SUM_BYTES, -(-(offset + found.nbytes) // _SUM_BYTES)):
                if not self._verified[i]:
                    self._verify(i)
        return found

    def _verify(self, i: int) -> None:
        start = _HEADER_BYTES + i * _SUM_BYTES
        end = min(start + _SUM_BYTES, self._sections["sums"].ctypes.data - self._bytes.ctypes.data)
        if zlib.crc32(self._bytes[start:end].data) != self._sections["sums"][i]:
            raise DamagedIndexError
        self._verified[i] = True


def _read_header(data: np.ndarray) -> dict[str, Any]:
    try:
        header = json.loads(data[:_HEADER_BYTES].tobytes())
        content = header["content"]
        if header["digest"] != _digest(content) or content["version"] != VERSION:
            raise DamagedIndexError
        return content
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DamagedIndexError from None


def _digest(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


class IndexWriter:
    """Writes an index, piece by piece, in bounded memory."""

    def __init__(self, out: BinaryIO, folder: Path | None):
        """Writes to `out`; temporary files are in `folder`, or in memory if it is None."""
        self._out = out
        self._folder = folder
        self._sums: list[int] = []
        self._sum = self._position = 0
        self._bases, self._gaps = self._spool(), self._spool()
        self._files: list[tuple[Any, ...]] = []
        self._count = self._gap_count = self._nbytes = 0
        out.write(bytes(_HEADER_BYTES))

    def _spool(self) -> BinaryIO:
        return tempfile.TemporaryFile(dir=self._folder) if self._folder else io.BytesIO()

    def add_file(
        self,
        pieces: Iterable[Pieces],
        *,
        size: int,
        mtime_ns: int,
        read: int,
        digest: bytes,
        sample: bytes,
        copy: bytes,
    ) -> None:
        """Adds the records of the next file: the pieces that are not left out."""
        before, end, first = self._count, 0, 0
        for start, (lengths, blank) in _positions(pieces):
            starts = (start + np.cumsum(lengths) - lengths)[~blank]
            lengths = np.minimum(lengths[~blank], _MAX_LENGTH)
            if not len(lengths):
                continue
            if self._count == before:
                first = end = int(starts[0])
            gap = starts - np.concatenate([[end], (starts + lengths)[:-1]])
            after = np.flatnonzero(gap)
            numbers = np.arange(self._count, self._count + len(lengths))
            based = np.flatnonzero(numbers % _STRIDE == 0)
            earlier_gaps = self._gap_count + np.searchsorted(after, based, side="right")
            self._bases.write(np.stack([starts[based], earlier_gaps], 1).astype("<i8").tobytes())
            self._gaps.write(np.stack([numbers[after] - 1, gap[after]], 1).astype("<i8").tobytes())
            self._write(lengths.astype("<u4").tobytes())
            self._count += len(lengths)
            self._gap_count += len(after)
            self._nbytes += int(lengths.sum())
            end = int(starts[-1] + lengths[-1])
        records = self._count - before
        self._files.append((size, mtime_ns, read, records, first, digest, sample, copy))

    def close(self) -> None:
        """Writes the rest, and the header last."""
        header: dict[str, Any] = {"version": VERSION, "nbytes": self._nbytes}
        header["lengths"] = [_HEADER_BYTES, self._count]
        for name, spool in (("bases", self._bases), ("gaps", self._gaps)):
            self._pad()
            count = spool.tell() // 16
            header[name] = [_HEADER_BYTES + self._position, count]
            spool.seek(0)
            while data := spool.read(1 << 20):
                self._write(data)
            spool.close()
        self._pad()
        header["files"] = [_HEADER_BYTES + self._position, len(self._files)]
        self._write(np.array(self._files, _FILE).tobytes())
        self._pad()
        header["sums"] = [_HEADER_BYTES + self._position, -(-self._position // _SUM_BYTES)]
        if self._position % _SUM_BYTES:
            self._sums.append(self._sum)
        sums = np.array(self._sums, "<u4").tobytes()
        self._out.write(sums)
        header["sums_digest"] = hashlib.blake2b(sums, digest_size=16).hexdigest()
        self._out.seek(0)
        self._out.write(
            json.dumps({"digest": _digest(header), "content": header}).encode().ljust(_HEADER_BYTES)
        )

    def _pad(self) -> None:
        self._write(bytes(-self._position % 8))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            part = view[: _SUM_BYTES - self._position % _SUM_BYTES]
            self._sum = zlib.crc32(part, self._sum)
            self._out.write(part)
            self._position += len(part)
            view = view[len(part) :]
            if self._position % _SUM_BYTES == 0:
                self._sums.append(self._sum)
                self._sum = 0


def _positions(pieces: Iterable[Pieces]) -> Iterable[tuple[int, Pieces]]:
    """Yields where each group of pieces begins, with the group."""
    start = 0
    for lengths, blank in pieces:
        yield start, (lengths, blank)
        start += int(lengths.sum())
