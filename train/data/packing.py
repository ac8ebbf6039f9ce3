"""Packs whole examples into rows by best fit, with a checkpointable state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import grain
import numpy as np

from llama_jax.errors import DataError

from .examples import EncodedExample

OPEN_BINS = 8  # rows being filled at once: more waste less padding, and mix epochs further
T = TypeVar("T")
_Placed = tuple[tuple[int, int, int], EncodedExample]  # the source, the record's number, its part; the part


class Bins(Generic[T]):
    """Best-fit packing: an item goes into the open row in which it leaves the least room.

    Attributes:
      rows: the items in each open row.
    """

    def __init__(self, size: int, rows: Iterable[Sequence[tuple[int, T]]] = ()):
        """Starts with open `rows` of (length, item) pairs."""
        self._size = size
        self.rows: list[list[T]] = []
        self._room: list[int] = []
        for row in rows:
            self.rows.append([item for _, item in row])
            self._room.append(size - sum(length for length, _ in row))

    def add(self, length: int, item: T) -> list[T] | None:
        """Adds an item of at most a row's length; returns a finished row, if there is one."""
        finished = None
        fits = [i for i, room in enumerate(self._room) if room >= length]
        if not fits and len(self.rows) == OPEN_BINS:
            finished = self._pop(min(range(OPEN_BINS), key=self._room.__getitem__))
        if not fits:
            self.rows.append([])
            self._room.append(self._size)
            fits = [len(self.rows) - 1]
        best = min(fits, key=self._room.__getitem__)
        self.rows[best].append(item)
        self._room[best] -= length
        if finished is None and not self._room[best]:
            return self._pop(best)
        return finished

    def drain(self) -> Iterator[list[T]]:
        """Yields the remaining rows."""
        while self.rows:
            yield self._pop(0)

    def _pop(self, i: int) -> list[T]:
        del self._room[i]
        return self.rows.pop(i)


def packed_row(examples: Sequence[EncodedExample], seq_len: int) -> dict[str, np.ndarray]:
    """Concatenates examples into a row, padded at the end.

    Returns:
      [seq_len] arrays: int32 `tokens`; `segment_ids`, from 1 (0 is padding), where the chosen answer of pair
      p is 2p + 1 and the rejected one 2p + 2; `positions`, which restart in each segment; `mask`, whose entry
      t is the loss weight of the prediction OF token t, or marks token t as labeled; f32 `value`, a segment's
      label or its pair's margin at its last token, 0 elsewhere; and, if the examples have it, f32
      `reference`, a segment's reference log-probability at its last token, 0 elsewhere.
    """
    names = ("tokens", "segment_ids", "positions", "mask")
    row = {name: np.zeros(seq_len, np.int32) for name in names}
    row["value"] = np.zeros(seq_len, np.float32)
    offset = 0
    segments = ((segment, example.value) for example in examples for segment in example.segments)
    for number, (segment, value) in enumerate(segments, 1):
        end = offset + len(segment)
        row["tokens"][offset:end] = segment.ids
        row["segment_ids"][offset:end] = number
        row["positions"][offset:end] = np.arange(len(segment))
        row["mask"][offset:end] = segment.mask
        row["value"][end - 1] = value
        offset = end
    if examples[0].reference:
        row["reference"] = np.zeros(seq_len, np.float32)
        row["reference"][segment_ends(examples)] = [
            number for example in examples for number in example.reference
        ]
    return row


def segment_ends(examples: Sequence[EncodedExample]) -> np.ndarray:
    """Returns the index in a row of each segment's last token."""
    return np.cumsum([len(segment) for example in examples for segment in example.segments]) - 1


def pack_examples(
    items: Iterable[tuple[EncodedExample, T]], seq_len: int
) -> Iterator[Sequence[tuple[EncodedExample, T]]]:
    """Packs a finite number of (example, payload) items into rows, each once."""
    bins: Bins[tuple[EncodedExample, T]] = Bins(seq_len)
    for example, payload in items:
        if row := bins.add(len(example), (example, payload)):
            yield row
    yield from bins.drain()


def packed_rows(examples: Iterable[tuple[EncodedExample, int]], seq_len: int) -> Iterator[dict[str, Any]]:
    """Packs a finite number of examples, each once, with the number of bytes of each one's answer.

    Yields:
      The arrays of `packed_row`, and `bytes`, the sum over the row.
    """
    for row in pack_examples(examples, seq_len):
        yield {
            **packed_row([example for example, _ in row], seq_len),
            "bytes": sum(nbytes for _, nbytes in row),
        }


class _ExampleStream(Protocol):
    """A lane's examples: the next one, and random access by source and number."""

    def next_item(self) -> tuple[int, int, Any]: ...

    def item(self, source: int, number: int) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class PackedExamples(grain.DatasetIterator):
    """Infinite rows of whole examples.

    Its state stays small: it lists the examples of open and finished rows by number, and reads them on
    restore.
    """

    def __init__(self, examples: _ExampleStream, seq_len: int):
        super().__init__()
        self._examples = examples
        self._seq_len = seq_len
        self._bins: Bins[_Placed] = Bins(seq_len)
        self._finished: list[list[_Placed]] = []  # a record whose turns are apart may finish several

    def __next__(self) -> dict[str, np.ndarray]:
        while not self._finished:
            source, number, item = self._examples.next_item()
            for index, part in enumerate(item.parts()):
                if row := self._bins.add(len(part), ((source, number, index), part)):
                    self._finished.append(row)
        return packed_row([example for _, example in self._finished.pop(0)], self._seq_len)

    def get_state(self) -> dict[str, Any]:
        state = {"parent_state": self._examples.get_state(), "open": _places(self._bins.rows)}
        return {**state, "finished": _places(self._finished)} if self._finished else state

    def set_state(self, state: dict[str, Any]) -> None:
        self._examples.set_state(state["parent_state"])
        open_rows = self._read(state["open"])
        self._bins = Bins(self._seq_len, [[(len(item[1]), item) for item in row] for row in open_rows])
        self._finished = self._read(state.get("finished", []))

    def _read(self, rows: list[list[list[int]]]) -> list[list[_Placed]]:
        return [[self._part(*place) for place in row] for row in rows]

    def _part(self, source: int, number: int, index: int = 0) -> _Placed:
        item = self._examples.item(source, number)
        if isinstance(item, str) or index >= len(parts := item.parts()):
            raise DataError("the checkpoint's data state is for other data; restore the original data")
        return (source, number, index), parts[index]


def _places(rows: list[list[_Placed]]) -> list[list[list[int]]]:
    """Returns where the examples of rows come from; the first part of a record is not numbered."""
    return [[list(place if place[2] else place[:2]) for place, _ in row] for row in rows]
