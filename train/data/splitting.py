"""The split into training and validation records: a function of each record's file name and number alone.

The validation records, a small part of all, are listed in order, and the others are found by counting: the
list is made once, in chunks, and mapped from the cache if there are many records.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from typing import BinaryIO, overload

import numpy as np

from .cache import keep

_CHUNK = 1 << 18  # records hashed at once
_MANY = 1 << 23  # records from which the list is kept on disk
_VERSION = 1


class TrainingRecords(Sequence[int]):
    """The numbers of the records that are not for validation, in order."""

    def __init__(self, records: int, validation: np.ndarray):
        """`validation` is int64 [n], ascending, of `records` records in all."""
        self._records = records
        self._validation = validation

    def __len__(self) -> int:
        return self._records - len(self._validation)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> list[int]: ...

    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        skipped = self._validation
        return index + bisect.bisect_right(range(len(skipped)), index, key=lambda k: int(skipped[k]) - k)

    def __reduce__(self) -> tuple[object, ...]:
        if isinstance(self._validation, np.memmap):  # a worker process maps the file itself
            return _mapped_training_records, (self._records, str(self._validation.filename))
        return TrainingRecords, (self._records, self._validation)


def _mapped_training_records(records: int, path: str) -> TrainingRecords:
    return TrainingRecords(records, np.memmap(path, "<i8", "r"))


def validation_records(names: Sequence[str], counts: np.ndarray, fraction: float) -> np.ndarray:
    """Returns int64 [n], ascending: the validation records, selected by `_keys` alone.

    With two or more records and `fraction` above 0, both splits have at least one record.

    Args:
      names: of the files, relative to the glob's fixed part.
      counts: int64 [files], number of records per file.
      fraction: of the records, approximately.
    """
    total = int(counts.sum())
    if not fraction or total < 2:
        return np.zeros(0, np.int64)
    if total < _MANY:
        return np.concatenate(list(_chunks(names, counts, fraction)))

    def write(out: BinaryIO) -> None:
        for chunk in _chunks(names, counts, fraction):
            out.write(chunk.astype("<i8").tobytes())

    described = json.dumps([_VERSION, list(names), counts.tolist(), fraction])
    key = hashlib.blake2b(described.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    what = f"the list of the validation records of {total}"
    path = keep(key, what, write, is_whole=lambda size: size > 0 and size % 8 == 0)
    return np.memmap(path, "<i8", "r")


def _chunks(names: Sequence[str], counts: np.ndarray, fraction: float) -> list[np.ndarray]:
    """Returns the validation records, in parts."""
    hashes, ends = _name_hashes(names), np.cumsum(counts)
    threshold = np.uint64(fraction * 2.0**64)
    lowest, highest = (2**64, -1), (-1, -1)  # (key, record)
    chunks = []
    for start in range(0, int(ends[-1]), _CHUNK):
        keys = _keys(hashes, counts, ends, start, min(start + _CHUNK, int(ends[-1])))
        low, high = int(keys.argmin()), int(keys.argmax())
        lowest = min(lowest, (int(keys[low]), start + low))
        if int(keys[high]) > highest[0]:
            highest = int(keys[high]), start + high
        chunks.append(start + np.flatnonzero(keys < threshold))
    if not any(map(len, chunks)):
        return [np.array([lowest[1]])]
    last = chunks[highest[1] // _CHUNK]
    chunks[highest[1] // _CHUNK] = last[last != highest[1]]
    return chunks


def _name_hashes(names: Sequence[str]) -> np.ndarray:
    hashed = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8) for name in names)
    return np.frombuffer(b"".join(name.digest() for name in hashed), "<u8")


def _keys(hashes: np.ndarray, counts: np.ndarray, ends: np.ndarray, start: int, end: int) -> np.ndarray:
    """Returns uint64 [end - start]: a hash of each record's file name and number, the same on every machine.

    The hash is SplitMix64 with the record number as its counter (Steele et al., OOPSLA 2014).
    """
    first, last = np.searchsorted(ends, [start, end - 1], side="right").tolist()
    files = slice(first, last + 1)
    begins = ends[files] - counts[files]
    within = np.minimum(ends[files], end) - np.maximum(begins, start)
    number = (np.arange(start + 1, end + 1) - np.repeat(begins, within)).astype(np.uint64)
    x = np.repeat(hashes[files], within) + number * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
