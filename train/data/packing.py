"""Rows of whole examples: which go together (best fit), what a row of them is, and where they have got to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import grain
import numpy as np

from llama_jax.errors import DataError

from .examples import Unit

OPEN = 8  # rows that are filled at a time: more of them waste less, and mix epochs further
T = TypeVar("T")


class Bins(Generic[T]):
    """Rows that are being filled: an item goes where it leaves the least room.

    Attributes:
      rows: the items of each open row.
    """

    def __init__(self, size: int, rows: Iterable[Sequence[tuple[int, T]]] = ()):
        """Goes on with `rows`, each of (length, item)."""
        self._size = size
        self.rows: list[list[T]] = []
        self._room: list[int] = []
        for row in rows:
            self.rows.append([item for _, item in row])
            self._room.append(size - sum(length for length, _ in row))

    def add(self, length: int, item: T) -> list[T] | None:
        """Puts an item, of at most a row's length, into a row; returns a row that is done, if one is."""
        done = None
        fits = [i for i, room in enumerate(self._room) if room >= length]
        if not fits and len(self.rows) == OPEN:
            done = self._take(min(range(OPEN), key=self._room.__getitem__))
        if not fits:
            self.rows.append([])
            self._room.append(self._size)
            fits = [len(self.rows) - 1]
        best = min(fits, key=self._room.__getitem__)
        self.rows[best].append(item)
        self._room[best] -= length
        if done is None and not self._room[best]:
            return self._take(best)
        return done

    def rest(self) -> Iterator[list[T]]:
        """Yields the rows that are left."""
        while self.rows:
            yield self._take(0)

    def _take(self, i: int) -> list[T]:
        del self._room[i]
        return self.rows.pop(i)


def packed_row(units: Sequence[Unit], seq_len: int) -> dict[str, np.ndarray]:
    """Lays examples out in a row, one after the other, padded at its end.

    Returns:
      [seq_len] arrays. int32 `tokens`; `segment_ids`, counted from 1, 0 is padding: of pair p the chosen
      answer's is 2p + 1 and the rejected one's 2p + 2; `positions`, which restart in each segment; `mask`,
      entry t of which weighs the prediction OF token t, or says that token t has a label; f32 `value`, at the
      last token of a segment its label, or its pair's margin, elsewhere 0; and, where units have it, f32
      `reference`, at the last token of a segment its number, elsewhere 0.
    """
    names = ("tokens", "segment_ids", "positions", "mask")
    row = {name: np.zeros(seq_len, np.int32) for name in names}
    row["value"] = np.zeros(seq_len, np.float32)
    at = 0
    laid = ((segment, unit.value) for unit in units for segment in unit.segments)
    for number, (segment, value) in enumerate(laid, 1):
        end = at + len(segment)
        row["tokens"][at:end] = segment.ids
        row["segment_ids"][at:end] = number
        row["positions"][at:end] = np.arange(len(segment))
        row["mask"][at:end] = segment.mask
        row["value"][end - 1] = value
        at = end
    if units[0].reference:
        row["reference"] = np.zeros(seq_len, np.float32)
        row["reference"][ends(units)] = [number for unit in units for number in unit.reference]
    return row


def ends(units: Sequence[Unit]) -> np.ndarray:
    """Returns where in a row each of its segments has its last token."""
    return np.cumsum([len(segment) for unit in units for segment in unit.segments]) - 1


def grouped(items: Iterable[tuple[Unit, T]], seq_len: int) -> Iterator[Sequence[tuple[Unit, T]]]:
    """Yields rows of a finite number of examples, each once, with what goes along with them."""
    bins: Bins[tuple[Unit, T]] = Bins(seq_len)
    for item in items:
        if done := bins.add(len(item[0]), item):
            yield done
    yield from bins.rest()


def packed_rows(units: Iterable[tuple[Unit, int]], seq_len: int) -> Iterator[dict[str, Any]]:
    """Packs a finite number of examples, each once, with the bytes of text that each one's answer spells.

    Yields:
      What `packed_row` returns, and `bytes`, the sum of the row's.
    """
    for row in grouped(units, seq_len):
        yield {**packed_row([unit for unit, _ in row], seq_len), "bytes": sum(nbytes for _, nbytes in row)}


class _Examples(Protocol):
    """A lane's examples: its next, and any of them again by source and number."""

    def draw(self) -> tuple[int, int, Any]: ...

    def at(self, source: int, number: int) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class PackedExamples(grain.DatasetIterator):
    """Rows of whole examples.

    Its state names the examples of the rows still open, which are read again: it stays small.
    """

    def __init__(self, examples: _Examples, seq_len: int):
        super().__init__()
        self._examples = examples
        self._seq_len = seq_len
        self._bins: Bins[tuple[int, int, Unit]] = Bins(seq_len)

    def __next__(self) -> dict[str, np.ndarray]:
        full = None
        while full is None:
            drawn: Any = self._examples.draw()
            full = self._bins.add(len(drawn[2]), drawn)
        return packed_row([unit for _, _, unit in full], self._seq_len)

    def get_state(self) -> dict[str, Any]:
        places = [[[source, number] for source, number, _ in row] for row in self._bins.rows]
        return {"parent_state": self._examples.get_state(), "open": places}

    def set_state(self, state: dict[str, Any]) -> None:
        self._examples.set_state(state["parent_state"])
        again: list[list[tuple[int, int, Any]]] = [
            [(source, number, self._examples.at(source, number)) for source, number in row]
            for row in state["open"]
        ]
        if any(isinstance(item, str) for row in again for _, _, item in row):
            raise DataError("the checkpoint's data state is of other data; put the data back as it was")
        self._bins = Bins(self._seq_len, [[(len(item[2]), item) for item in row] for row in again])
