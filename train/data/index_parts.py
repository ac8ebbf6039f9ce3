"""Parts of an index in the making: what scanning ranges of bytes found, a file for each unit of work.

lengths    uint32 of every piece, of all ranges
blanks     int64, of each range: which of its pieces are no records
digests    16 bytes a block, of each range
a JSON object that lists the ranges, and its length in 8 bytes
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any, BinaryIO

import numpy as np

from llama_jax.errors import DataError

from .compression import Plain
from .files import File, sampled_digest
from .pieces import DIGEST_BYTES, Kind, Pieces, scan

_GROUP = 1 << 18  # pieces in memory
_MAX_LENGTH = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Range:
    """A range of bytes of a file; `end` is None for all of it, decompressed if it is compressed."""

    file: int
    start: int = 0
    end: int | None = None


Unit = tuple[Range, ...]


def write_part(
    out: BinaryIO,
    unit: Unit,
    files: Sequence[File],
    kind: Kind,
    *,
    plain: Plain,
    progress: Callable[[int], None],
    hashing: Executor | None = None,
    sampled: bool = True,
) -> None:
    """Scans the ranges of a unit of work.

    Args:
      out: a file to write to.
      unit: the ranges.
      files: the files, as they were found.
      kind: how they are divided into records.
      plain: decompresses files and checks that they are text.
      progress: called with numbers of bytes that have been scanned.
      hashing: hashes blocks beside the scan.
      sampled: whether later starts compare samples of the files.

    Raises:
      DataError: if a file cannot be read, or changes meanwhile.
    """
    blanks, digests, ranges = io.BytesIO(), io.BytesIO(), []
    for place in unit:
        original = files[place.file]
        file = original if place.end is not None else plain(original)
        pieces = bytes_read = 0
        blanks_before, digests_before = blanks.tell(), digests.tell()

        def on_block(size: int, digest: bytes) -> None:
            nonlocal bytes_read
            bytes_read += size
            digests.write(digest)
            progress(size)

        end = file.nbytes if place.end is None else place.end
        for lengths, blank in scan(file, kind, place.start, end, on_block, hashing):
            lengths, blank = _short(lengths, blank)
            out.write(lengths.astype("<u4").tobytes())
            blanks.write((pieces + np.flatnonzero(blank)).astype("<i8").tobytes())
            pieces += len(lengths)
        if bytes_read != end - place.start:
            raise DataError(f"{original.path} changed while it was indexed; run the command again")
        file.check()
        found: dict[str, Any] = {
            "file": place.file,
            "start": place.start,
            "end": end,
            "open": end < file.nbytes and file.read(end - 1, 1) != b"\n",
            "pieces": pieces,
            "blanks": (blanks.tell() - blanks_before) // 8,
            "blocks": (digests.tell() - digests_before) // DIGEST_BYTES,
        }
        if place.start == 0:
            found["sample"] = sampled_digest(original).hex() if sampled else ""
            found["copy"] = file.copy.key if file.copy else ""
        ranges.append(found)
    for part in (blanks, digests):
        out.write(part.getbuffer())
    footer = json.dumps(ranges).encode()
    out.write(footer + len(footer).to_bytes(8, "little"))


def _short(lengths: np.ndarray, blank: np.ndarray) -> Pieces:
    """Cuts pieces that are longer than 32 bits can say into a record and a piece that is none."""
    if len(lengths) == 0 or int(lengths.max()) <= _MAX_LENGTH:
        return lengths, blank
    cut_lengths: list[int] = []
    cut_blank: list[bool] = []
    for length, is_blank in zip(lengths.tolist(), blank.tolist(), strict=True):
        while length > _MAX_LENGTH:
            cut_lengths.append(_MAX_LENGTH)
            cut_blank.append(is_blank)
            length, is_blank = length - _MAX_LENGTH, True
        cut_lengths.append(length)
        cut_blank.append(is_blank)
    return np.array(cut_lengths), np.array(cut_blank)


class ScannedRange:
    """One range of a part.

    Attributes:
      facts: its entry in the part's list.
      digests: of its blocks.
    """

    def __init__(self, facts: dict[str, Any], lengths: np.ndarray, blanks: np.ndarray, digests: bytes):
        self.facts = facts
        self.digests = digests
        self._lengths = lengths
        self._blanks = blanks

    def pieces(self) -> Iterator[Pieces]:
        """Yields its pieces, in groups."""
        for start in range(0, len(self._lengths), _GROUP):
            lengths = self._lengths[start : start + _GROUP].astype(np.int64)
            first, end = np.searchsorted(self._blanks, [start, start + len(lengths)])
            blank = np.zeros(len(lengths), bool)
            blank[self._blanks[first:end] - start] = True
            yield lengths, blank


def read_part(data: np.ndarray) -> list[ScannedRange]:
    """Returns the ranges of a part, from its bytes.

    Raises:
      ValueError: if it is not complete.
    """
    if len(data) < 8:
        raise ValueError("too short")
    size = int.from_bytes(data[-8:].tobytes(), "little")
    ranges = json.loads(data[-8 - size : -8].tobytes()) if 0 < size <= len(data) - 8 else []
    counts = np.array([[r["pieces"] * 4, r["blanks"] * 8, r["blocks"] * DIGEST_BYTES] for r in ranges])
    if not ranges or counts.sum() + size + 8 != len(data):
        raise ValueError("not complete")
    ends = np.cumsum(counts.T.ravel()).reshape(3, -1).T
    found = []
    for facts, (a, b, c), sizes in zip(ranges, ends.tolist(), counts.tolist(), strict=True):
        lengths = data[a - sizes[0] : a].view("<u4")
        found.append(
            ScannedRange(facts, lengths, data[b - sizes[1] : b].view("<i8"), data[c - sizes[2] : c].tobytes())
        )
    return found


def joined(ranges: Sequence[ScannedRange]) -> Iterator[Pieces]:
    """Yields the pieces of the ranges of a file, in order; a line that they divide is one piece."""
    held: Pieces | None = None  # of a line that goes on in the next range
    for found in ranges:
        group: Pieces | None = None
        for lengths, blank in found.pieces():
            if group is not None:
                yield group
            if held is not None:
                lengths[0] += held[0][0]
                blank[0] &= held[1][0]
                held = None
            group = lengths, blank
        if group is not None and found.facts["open"]:
            held = group[0][-1:], group[1][-1:]
            group = group[0][:-1], group[1][:-1]
        if group is not None:
            yield group
    if held is not None:
        yield held
