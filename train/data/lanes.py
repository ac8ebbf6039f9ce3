"""Lanes: one endless stream of packed sequences for each row of the global batch.

Lane r of R takes every R-th document or example of each source's endless shuffled order, from the r-th on,
mixes them by the sources' weights, and packs them by itself. So a row depends on nothing but the seed, its
number and the step; which process makes it, and how many there are, changes nothing; and the state of a
run is its lanes' states, dealt out again to however many processes go on with it.
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

from .examples import Examples, Unit
from .packing import PackedExamples
from .records import BadRecord, refusal
from .source import Source

State = dict[str, Any]
Usable = np.ndarray | Unit


class TrainDocuments:
    """Random access to the documents that are trained on: ids, or the reason why there are none."""

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
            raise DataError(refusal(bad.message)) from None

    def __repr__(self) -> str:
        return f"TrainDocuments({len(self)})"


def endless(
    documents: TrainDocuments | Examples, blocks: np.ndarray | None, seed: str | None
) -> grain.MapDataset:
    """Returns a source's endless order of documents, epoch after epoch.

    Args:
      documents: of the source.
      blocks: the sizes of runs of documents to keep together, or None.
      seed: of the order, which each epoch has anew; any string. None is the order in which they lie.
    """
    order: grain.MapDataset = grain.MapDataset.source(documents)
    if seed is not None:
        # Grain counts a shuffle's seed up from epoch to epoch: hashing keeps seeds 0 and 1 apart.
        hashed = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=4).digest(), "little")
        order = order.shuffle(hashed) if blocks is None else _BlockShuffle(order, blocks, hashed)
    return order.repeat()


class _BlockShuffle(grain.MapDataset):
    """Shuffles blocks, and the documents within each: neighbours in the order are cheap to read together."""

    def __init__(self, parent: grain.MapDataset, sizes: np.ndarray, seed: int):
        super().__init__(parent)
        self._sizes = sizes[sizes > 0]
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed = seed
        self._orders: dict[int, tuple[list[int], np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        order, ends = self._order_of(epoch)
        nth = int(np.searchsorted(ends, place, side="right"))
        block = order[nth]
        size = int(self._sizes[block])
        within = place - (int(ends[nth]) - size)
        seed = (self._seed + epoch + 1 + block) % 2**32
        within = index_shuffle(within, max_index=size - 1, seed=seed, rounds=4)
        return self._parent[int(self._starts[block]) + within + epoch * len(self)]

    def _order_of(self, epoch: int) -> tuple[list[int], np.ndarray]:
        """Returns an epoch's order of blocks, and where in the epoch each ends."""
        if epoch not in self._orders:
            last, seed = len(self._sizes) - 1, (self._seed + epoch) % 2**32
            order = [index_shuffle(i, max_index=last, seed=seed, rounds=4) for i in range(last + 1)]
            self._orders[epoch] = order, np.cumsum(self._sizes[order])
            self._orders.pop(epoch - 4, None)  # lanes are never that far apart for long
        return self._orders[epoch]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources in proportion.

    Attributes:
      orders: the endless order of each.
      weights: the share of each in the tokens of every lane.
      patience: how many records in a row may hold no usable text before a lane gives up.
    """

    orders: Sequence[grain.MapDataset]
    weights: Sequence[float]
    patience: int

    def first(self, quantile: float) -> int:
        """Returns the source in which a lane begins, so that lanes begin in proportion."""
        ends = np.cumsum(self.weights) / np.sum(self.weights)
        return min(int(np.searchsorted(ends, quantile, side="right")), len(ends) - 1)

    def behind(self, drawn: Sequence[int]) -> int:
        """Returns the source that has the least for its weight."""
        return min(range(len(drawn)), key=lambda source: drawn[source] / self.weights[source])


class LaneDocuments(grain.IterDataset):
    """A lane's documents: of each source every `stride`-th, from the `first` on, in proportion by tokens."""

    def __init__(self, mixture: Mixture, first: int, stride: int):
        super().__init__()
        self._settings = (mixture, first, stride)

    def __iter__(self) -> grain.DatasetIterator:
        return LaneDocumentIterator(*self._settings)


class LaneDocumentIterator(grain.DatasetIterator):
    """What is next in a lane."""

    def __init__(self, mixture: Mixture, first: int, stride: int):
        super().__init__()
        self._mixture = mixture
        self._first = first
        self._stride = stride
        self._taken = [0] * len(mixture.orders)  # documents of each source
        self._drawn = [0] * len(mixture.orders)  # tokens of each
        self._skipped: dict[str, int] = {}

    def __next__(self) -> dict[str, Any]:
        _, _, item = self.draw()
        return {"tokens": item}

    def at(self, source: int, number: int) -> Usable | str:
        """Returns what a lane takes of a source as its `number`-th, or the reason why it takes nothing."""
        return self._mixture.orders[source][self._first + self._stride * number]

    def draw(self) -> tuple[int, int, Usable]:
        """Returns the next document or example, and its source and number there.

        Raises:
          DataError: if nothing usable comes for long.
        """
        for _ in range(self._mixture.patience):
            source = (
                self._mixture.behind(self._drawn)
                if any(self._drawn)
                else self._mixture.first((self._first + 0.5) / self._stride)
            )
            number = self._taken[source]
            item = self.at(source, number)
            self._taken[source] += 1
            if isinstance(item, str):
                self._skipped[item] = self._skipped.get(item, 0) + 1
            elif len(item):
                self._drawn[source] += len(item)
                return source, number, item
        why = f" (skipped: {counted(self._skipped)})" if self._skipped else ""
        raise DataError(f"{self._mixture.patience} records in a row hold no usable text{why}; check the data")

    def get_state(self) -> State:
        return {"taken": list(self._taken), "drawn": list(self._drawn), "skipped": dict(self._skipped)}

    def set_state(self, state: State) -> None:
        self._taken = list(state["taken"])
        self._drawn = list(state["drawn"])
        self._skipped = dict(state["skipped"])


class LaneBatches(grain.IterDataset):
    """The next sequence of each of some lanes, step after step.

    Elements are dicts of `tokens`, `segment_ids`, `positions`, int32 [lanes, seq_len], of examples also
    `mask` and f32 `value`, and `state`, JSON: the state of each lane after it.
    """

    def __init__(
        self,
        mixture: Mixture,
        lanes: Sequence[int],
        lane_count: int,
        seq_len: int,
        states: Mapping[str, State] | None = None,
        *,
        whole: bool = False,
    ):
        """`whole` is whether rows are packed without cutting anything, which examples are."""
        super().__init__()
        self._mixture = mixture
        self._whole = whole
        self._lanes = tuple(lanes)
        self._lane_count = lane_count
        self._seq_len = seq_len
        self._states = states

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Keeps some of the lanes: Grain calls it in each worker process."""
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
        if self._whole:
            return PackedExamples(iter(documents), self._seq_len)
        return _Cut(iter(ConcatThenSplitIterDataset(documents, length_struct={"tokens": self._seq_len})))


class _Cut(grain.DatasetIterator):
    """Rows of documents that are cut where a row ends."""

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
        self._packer.set_state(_tuples(state))


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


def _tuples(value: Any) -> Any:
    """Returns what JSON made lists of as the tuples that Grain's packer compares with."""
    if isinstance(value, dict):
        return {key: _tuples(part) for key, part in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def counted(skipped: Mapping[str, int]) -> str:
    """Returns reasons and counts for a message."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))
