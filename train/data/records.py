"""The interface of every file format: numbered records, each a text or a row of named fields."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .files import File

MAX_RECORD_BYTES = 64 << 20  # longer documents are bad records


class BadRecord(Exception):
    """A record that cannot be used.

    Attributes:
      reason: the kind of error; skipped records are counted by it.
      message: the details, with the location.
      has_location: whether the message contains the location, which may require reading the file.
    """

    has_location = True

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of consecutive records, each of which is read at once.

    Attributes:
      sizes: int64 [blocks], number of records in each.
      window: how many blocks are in memory, so that their records can be shuffled together.
    """

    sizes: np.ndarray
    window: int


class Records(abc.ABC):
    """The records of a source's files, in order.

    Attributes:
      files: the files.
      counts: int64 [files], number of records per file.
      nbytes: approximate number of bytes of text.
      digest: a hash of the files' contents.
      blocks: the blocks of records that are cheap to read together; None if random access is cheap.
    """

    files: Sequence[File]
    counts: np.ndarray
    nbytes: int
    digest: str
    blocks: Blocks | None = None

    def __len__(self) -> int:
        return int(self.counts.sum())

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.counts)

    def locate(self, index: int) -> tuple[int, int]:
        """Returns the file index of a record and its number within the file."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return file, index - int(self._ends[file] - self.counts[file])

    @abc.abstractmethod
    def text(self, index: int) -> str:
        """Returns a document's text; an empty one is ignored.

        Raises:
          BadRecord: if the record cannot be used.
          DataError: if its file cannot be read.
        """

    def row(self, index: int) -> dict[str, Any]:
        """Returns all fields of a record.

        Raises:
          BadRecord: if the record cannot be used; its message starts with its location.
          DataError: if its file cannot be read.
        """
        return {"text": self.text(index)}

    def location(self, index: int) -> str:
        """Returns a record's file and number, for messages."""
        file, record = self.locate(index)
        return f"{self.files[file].path}, record {record}"


class TooLongRecord(BadRecord):
    """A record with more tokens than fit in a row."""


def bad_record_error(message: str) -> str:
    """Returns the error message for a bad record that stops the run."""
    return f'{message}; fix it, or set data.bad_records = "skip"'


def record_keys(names: Sequence[str], counts: np.ndarray) -> np.ndarray:
    """Returns uint64 [records]: a hash of each record's file name and number, the same on every machine.

    The hash is SplitMix64 with the record number as its counter (Steele et al., OOPSLA 2014).
    """
    hashed = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8) for name in names)
    start = np.frombuffer(b"".join(name.digest() for name in hashed), "<u8")
    first = np.cumsum(counts) - counts
    number = (np.arange(counts.sum()) - np.repeat(first, counts) + 1).astype(np.uint64)
    x = np.repeat(start, counts) + number * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def validation_mask(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Returns bool [records]: the validation records, selected by their keys alone.

    With two or more records and `fraction` above 0, both splits have at least one record.
    """
    if not fraction or len(keys) < 2:
        return np.zeros(len(keys), bool)
    mask = keys < np.uint64(fraction * 2.0**64)
    mask[np.argmin(keys)] = True
    mask[np.argmax(keys)] = False
    return mask


def decode(data: bytes, where: str) -> str:
    """Returns UTF-8 text.

    Raises:
      BadRecord: if the bytes are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise BadRecord("not UTF-8", f"{where}: not UTF-8 (byte 0x{byte:02x}, {error.reason})") from None
