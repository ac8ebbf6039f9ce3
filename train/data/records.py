"""What every format gives: numbered records, each the text of one document or a row of named fields."""

from __future__ import annotations

import abc
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .files import File

MAX_RECORD = 64 << 20  # bytes of one document; longer ones are bad records


class BadRecord(Exception):
    """A record that cannot be used.

    Attributes:
      reason: what is wrong, in words that many records share: they are counted by it.
      message: where, and what in particular.
      placed: whether the message says where: that may take reading the file.
    """

    placed = True

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


class Records(abc.ABC):
    """The records of a source's files, in order.

    Attributes:
      files: the files.
      counts: int64 [files], the records in each.
      nbytes: about how many bytes of text there are.
      digest: a hash of the files' contents.
      blocks: sizes of the runs of records that are cheap to read together, or None where any record
        is as cheap as the next.
    """

    files: Sequence[File]
    counts: np.ndarray
    nbytes: int
    digest: str
    blocks: np.ndarray | None = None

    def __len__(self) -> int:
        return int(self.counts.sum())

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.counts)

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the file of a record and the record's number in it."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - int(self._ends[file] - self.counts[file])

    @abc.abstractmethod
    def text(self, index: int) -> str:
        """Returns a document; empty ones count as none.

        Raises:
          BadRecord: if the record cannot be used.
          DataError: if its file cannot be read.
        """

    def row(self, index: int) -> dict[str, Any]:
        """Returns all fields of a record.

        Raises:
          BadRecord: if the record cannot be used; its message begins with where it is.
          DataError: if its file cannot be read.
        """
        return {"text": self.text(index)}

    def where(self, index: int) -> str:
        """Returns where a record is, for people."""
        file, record = self.locate(index)
        return f"{self.files[file].path}, record {record}"


class TooLongRecord(BadRecord):
    """A record of more tokens than a row holds."""


def refusal(message: str) -> str:
    """Returns what to say of a bad record that stops the run."""
    return f'{message}; mend it, or set data.bad_records = "skip"'


def keys(names: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """Returns uint64 [records]: a hash of each record's file and number, the same on every machine.

    The numbers are scrambled as SplitMix64 does its counter (Steele et al., OOPSLA 2014).
    """
    hashed = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8) for name in names)
    start = np.frombuffer(b"".join(name.digest() for name in hashed), "<u8")
    first = np.cumsum(counts) - counts
    number = (np.arange(counts.sum()) - np.repeat(first, counts) + 1).astype(np.uint64)
    x = np.repeat(start, counts) + number * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def held_out(key: np.ndarray, share: float) -> np.ndarray:
    """Returns bool [records]: which are kept for evaluation, by their keys alone.

    Where there are two records or more and `share` is above 0, at least one is held out, and at least
    one is not.
    """
    if not share or len(key) < 2:
        return np.zeros(len(key), bool)
    chosen = key < np.uint64(share * 2.0**64)
    chosen[np.argmin(key)] = True
    chosen[np.argmax(key)] = False
    return chosen


def decode(data: bytes, where: str) -> str:
    """Returns UTF-8 text.

    Raises:
      BadRecord: if it is not.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise BadRecord("not UTF-8", f"{where}: not UTF-8 (byte 0x{byte:02x}, {error.reason})") from None
