"""Lanes: one infinite stream of packed sequences for each row of the global batch.

Lane r of R takes documents or examples r, r + R, r + 2R, ... of each source's infinite shuffled order, mixes
them by the sources' weights, and packs them independently of the other lanes. A row therefore depends only on
the seed, its number and the step, not on the number of processes. A run's state consists of its lanes'
states, from which any number of processes can resume.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import ConcatThenSplitIterDataset

from llama_jax.errors import DataError

from .examples import EncodedExample
from .packing import PackedExamples

State = dict[str, Any]
Usable = np.ndarray | EncodedExample


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources mixed by weight.

    Attributes:
      orders: the infinite order of each source.
      weights: each source's relative share of the tokens of every lane.
      patience: number of consecutive unusable records after which a lane raises.
    """

    orders: Sequence[grain.MapDataset]
    weights: Sequence[float]
    patience: int

    def first_source(self, quantile: float) -> int:
        """Returns the source that a lane starts with, so that the first rows follow the weights."""
        ends = np.cumsum(self.weights) / np.sum(self.weights)
        return min(int(np.searchsorted(ends, quantile, side="right")), len(ends) - 1)

    def next_source(self, tokens: Sequence[int]) -> int:
        """Returns the source with the fewest tokens relative to its weight."""
        return min(range(len(tokens)), key=lambda source: tokens[source] / self.weights[source])


class LaneDocuments(grain.IterDataset):
    """A lane's documents: every `stride`-th of each source, starting at `first`, mixed by weight."""

    def __init__(self, mixture: Mixture, first: int, stride: int):
        super().__init__()
        self._settings = (mixture, first, stride)

    def __iter__(self) -> grain.DatasetIterator:
        return LaneDocumentIterator(*self._settings)


class LaneDocumentIterator(grain.DatasetIterator):
    """Iterates over a lane's documents or examples."""

    def __init__(self, mixture: Mixture, first: int, stride: int):
        super().__init__()
        self._mixture = mixture
        self._first = first
        self._stride = stride
        self._taken = [0] * len(mixture.orders)  # documents taken from each source
        self._tokens = [0] * len(mixture.orders)  # tokens taken from each source
        self._skipped: dict[str, int] = {}

    def __next__(self) -> dict[str, Any]:
        _, _, item = self.next_item()
        return {"tokens": item}

    def item(self, source: int, number: int) -> Usable | str:
        """Returns the lane's `number`-th item of a source, or the reason it is unusable."""
        return self._mixture.orders[source][self._first + self._stride * number]

    def next_item(self) -> tuple[int, int, Usable]:
        """Returns the next usable item, as (source, number, item).

        Raises:
          DataError: after `Mixture.patience` consecutive unusable records.
        """
        for _ in range(self._mixture.patience):
            source = (
                self._mixture.next_source(self._tokens)
                if any(self._tokens)
                else self._mixture.first_source((self._first + 0.5) / self._stride)
            )
            number = self._taken[source]
            item = self.item(source, number)
            self._taken[source] += 1
            if isinstance(item, str):
                self._skipped[item] = self._skipped.get(item, 0) + 1
            elif len(item):
                self._tokens[source] += len(item)
                return source, number, item
        why = f" (skipped: {format_counts(self._skipped)})" if self._skipped else ""
        raise DataError(
            f"{self._mixture.patience} consecutive records have no usable text{why}; check the data"
        )

    def get_state(self) -> State:
        return {"taken": list(self._taken), "drawn": list(self._tokens), "skipped": dict(self._skipped)}

    def set_state(self, state: State) -> None:
        self._taken = list(state["taken"])
        self._tokens = list(state["drawn"])
        self._skipped = dict(state["skipped"])


class LaneBatches(grain.IterDataset):
    """The next sequence of each of some lanes, for every step.

    Elements are dicts of `tokens`, `segment_ids`, `positions`, int32 [lanes, seq_len], for examples also
    `mask` and f32 `value`, and `state`: JSON with the state of each lane afterwards.
    """

    def __init__(
        self,
        mixture: Mixture,
        lanes: Sequence[int],
        lane_count: int,
        seq_len: int,
        states: Mapping[str, State] | None = None,
        *,
        whole_examples: bool = False,
        separators: Sequence[int] = (),
    ):
        """`whole_examples` packs items without splitting them; otherwise documents are split at row ends.

        Documents end at the ids `separators` too.
        """
        super().__init__()
        self._mixture = mixture
        self._whole_examples = whole_examples
        self._separators = tuple(separators)
        self._lanes = tuple(lanes)
        self._lane_count = lane_count
        self._seq_len = seq_len
        self._states = states

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keeps a slice of the lanes; Grain calls this in each worker process."""
        del sequential_slice
        self._lanes = self._lanes[sl]

    def __iter__(self) -> grain.DatasetIterator:
        packed = {}
        for lane in self._lanes:
            packed[str(lane)] = self._packed(LaneDocuments(self._mixture, lane, self._lane_count))
        iterator = _LaneBatchIterator(packed)
        if self._states is not None:
            iterator.set_state({lane: self._states[lane] for lane in packed})
        return iterator

    def _packed(self, documents: LaneDocuments) -> grain.DatasetIterator:
        if self._whole_examples:
            return PackedExamples(iter(documents), self._seq_len)
        return _SplitDocuments(
            iter(ConcatThenSplitIterDataset(documents, length_struct={"tokens": self._seq_len})),
            self._separators,
        )


class _SplitDocuments(grain.DatasetIterator):
    """Rows of documents, split where a row ends."""

    def __init__(self, packer: grain.DatasetIterator, separators: Sequence[int]):
        super().__init__()
        self._packer = packer
        self._separators = separators

    def __next__(self) -> dict[str, np.ndarray]:
        row = next(self._packer)
        tokens, segment_ids, positions = (
            row[name] for name in ("tokens", "tokens_segment_ids", "tokens_positions")
        )
        if np.isin(tokens, self._separators).any():
            segment_ids, positions = split_segments(tokens, segment_ids, self._separators)
        return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions}

    def get_state(self) -> State:
        return self._packer.get_state()

    def set_state(self, state: State) -> None:
        self._packer.set_state(_to_tuples(state))


def split_segments(
    tokens: np.ndarray, segment_ids: np.ndarray, separators: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns segment ids and positions of a full row, int32 [T], whose segments end at `separators` too."""
    starts = np.diff(segment_ids, prepend=0) != 0
    starts[1:] |= np.isin(tokens[:-1], separators)
    first = np.maximum.accumulate(np.where(starts, np.arange(len(tokens)), 0))
    return np.cumsum(starts, dtype=np.int32), np.arange(len(tokens), dtype=np.int32) - first.astype(np.int32)


class _LaneBatchIterator(grain.DatasetIterator):
    def __init__(self, lanes: Mapping[str, grain.DatasetIterator]):
        super().__init__()
        self._lanes_by_name = lanes

    def __next__(self) -> dict[str, Any]:
        rows = [next(lane) for lane in self._lanes_by_name.values()]
        arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return {**arrays, "state": json.dumps(self.get_state())}

    def get_state(self) -> dict[str, State]:
        return {name: lane.get_state() for name, lane in self._lanes_by_name.items()}

    def set_state(self, state: Mapping[str, State]) -> None:
        for name, lane in self._lanes_by_name.items():
            lane.set_state(state[name])


def _to_tuples(value: Any) -> Any:
    """Converts JSON lists to tuples, which Grain's packer compares against."""
    if isinstance(value, dict):
        return {key: _to_tuples(part) for key, part in value.items()}
    return tuple(map(_to_tuples, value)) if isinstance(value, (list, tuple)) else value


def format_counts(skipped: Mapping[str, int]) -> str:
    """Formats counts by reason for a message."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
