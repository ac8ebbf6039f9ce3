"""Lanes: one infinite stream of packed sequences for each row of the global batch.

Lane r of R takes documents or examples r, r + R, r + 2R, ... of each source's infinite shuffled order, mixes
them by the sources' weights, and packs them independently of the other lanes. A row therefore depends only on
the seed, its number and the step, not on the number of processes. A run's state consists of its lanes'
states, from which any number of processes can resume.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from grain.experimental import ConcatThenSplitIterDataset, index_shuffle

from llama_jax.errors import DataError

from .examples import EncodedExample, Examples
from .packing import PackedExamples
from .records import BadRecord, Blocks, bad_record_error
from .source import Source

State = dict[str, Any]
Usable = np.ndarray | EncodedExample


class TrainDocuments:
    """Random access to training documents: their ids, or the reason a record is unusable."""

    def __init__(self, source: Source, index: np.ndarray, skip_bad: bool):
        self._source = source
        self._index = index
        self._skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> np.ndarray | str:
        try:
            return self._source.document(int(self._index[i])).ids
        except BadRecord as bad:
            if self._skip_bad:
                return bad.reason
            raise DataError(bad_record_error(bad.message)) from None

    def __repr__(self) -> str:
        return f"TrainDocuments({len(self)})"


def infinite_order(
    documents: TrainDocuments | Examples, blocks: Blocks | None, seed: str | None
) -> grain.MapDataset:
    """Returns a source's infinite order of documents, epoch after epoch.

    Args:
      documents: the source's.
      blocks: the blocks of documents that are read together, or None.
      seed: of the shuffle, which differs in each epoch; any string. None keeps the file order.
    """
    order: grain.MapDataset = grain.MapDataset.source(documents)
    if seed is not None:
        # Grain adds the epoch to a shuffle's seed: hashing keeps seeds 0 and 1 from overlapping.
        hashed = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=4).digest(), "little")
        order = order.shuffle(hashed) if blocks is None else _WindowShuffle(order, blocks, hashed)
    return order.repeat()


class _WindowShuffle(grain.MapDataset):
    """Shuffles blocks, and the documents of each window of blocks together.

    Neighbors in the order are in the same few blocks, which are in memory. If all blocks fit in one window
    this is a shuffle of all documents; if not, a window is a random sample of the blocks.
    """

    def __init__(self, parent: grain.MapDataset, blocks: Blocks, seed: int):
        super().__init__(parent)
        self._sizes = blocks.sizes[blocks.sizes > 0]
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._windows = -(-len(self._sizes) // max(blocks.window, 1))  # of about equal numbers of blocks
        self._seed = seed
        self._orders: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._parent)  # private: tests/test_private_seams.py

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        order, block_ends, window_ends = self._order_of(epoch)
        window = int(np.searchsorted(window_ends, place, side="right"))
        start = int(window_ends[window - 1]) if window else 0
        size = int(window_ends[window]) - start
        seed = (self._seed + epoch + 1 + window) % 2**32
        shuffled = start + index_shuffle(place - start, max_index=size - 1, seed=seed, rounds=4)
        nth = int(np.searchsorted(block_ends, shuffled, side="right"))
        block = int(order[nth])
        within = shuffled - (int(block_ends[nth]) - int(self._sizes[block]))
        return self._parent[int(self._starts[block]) + within + epoch * len(self)]

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns an epoch's order of blocks, and the ends of its blocks and windows in that order."""
        if epoch not in self._orders:
            last, seed = len(self._sizes) - 1, (self._seed + epoch) % 2**32
            order = np.array([index_shuffle(i, max_index=last, seed=seed, rounds=4) for i in range(last + 1)])
            ends = np.cumsum(self._sizes[order])
            windows = np.array([part[-1] for part in np.array_split(ends, self._windows)])
            self._orders[epoch] = order, ends, windows
            self._orders.pop(epoch - 4, None)  # lanes are rarely more than 4 epochs apart
        return self._orders[epoch]


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
    ):
        """`whole_examples` packs items without splitting them; otherwise documents are split at row ends."""
        super().__init__()
        self._mixture = mixture
        self._whole_examples = whole_examples
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
            iter(ConcatThenSplitIterDataset(documents, length_struct={"tokens": self._seq_len}))
        )


class _SplitDocuments(grain.DatasetIterator):
    """Rows of documents, split where a row ends."""

    def __init__(self, packer: grain.DatasetIterator):
        super().__init__()
        self._packer = packer

    def __next__(self) -> dict[str, np.ndarray]:
        row = next(self._packer)
        return {
            "tokens": row["tokens"],
            "segment_ids": row["tokens_segment_ids"],
            "positions": row["tokens_positions"],
        }

    def get_state(self) -> State:
        return self._packer.get_state()

    def set_state(self, state: State) -> None:
        self._packer.set_state(_to_tuples(state))


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
