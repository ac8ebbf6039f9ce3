"""The interface of every file format: numbered records, each a text or a row of named fields."""

from __future__ import annotations

import abc
import dataclasses
import functools
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

    def earlier_digest(self) -> str:
        """Returns the digest by which earlier versions knew these files, which may read all of them."""
        return self.digest

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

    def select(self, columns: Sequence[str]) -> None:
        """Lets `row` leave out other fields than `columns`, where that is cheaper."""
        del columns

    def location(self, index: int) -> str:
        """Returns a record's file and number, for messages."""
        file, record = self.locate(index)
        return f"{self.files[file].path}, record {record}"


class TooLongRecord(BadRecord):
    """A record with more tokens than fit in a row."""


def bad_record_error(message: str) -> str:
    """Returns the error message for a bad record that stops the run."""
    return f'{message}; fix it, or set data.bad_records = "skip"'


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
