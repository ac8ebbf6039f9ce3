"""A source's infinite order of documents: permutations that are computed, not stored."""

from __future__ import annotations

import hashlib
from typing import Any

import grain
import numpy as np
from grain.experimental import index_shuffle

from .examples import Examples
from .records import Blocks
from .source import TrainDocuments

_MAX_SHUFFLED = 1 << 32  # documents that Grain's shuffle can number
_ROUNDS = 8


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
        hashed = shuffle_seed(seed)
        if blocks is not None:
            order = _WindowShuffle(order, blocks, hashed)
        elif len(documents) <= _MAX_SHUFFLED:
            order = order.shuffle(hashed)
        else:
            order = _LargeShuffle(order, hashed)
    return order.repeat()


def shuffle_seed(seed: str) -> int:
    """Returns the seed of Grain's shuffle, to which it adds the epoch: hashes of 0 and 1 do not overlap."""
    return int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=4).digest(), "little")


class _LargeShuffle(grain.MapDataset):
    """Shuffles more documents than Grain's shuffle can number."""

    def __init__(self, parent: grain.MapDataset, seed: int):
        super().__init__(parent)
        self._seed = seed

    def __len__(self) -> int:
        return len(self._parent)  # private: tests/test_private_seams.py

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, place = divmod(index, len(self))
        return self._parent[permuted(place, len(self), f"{self._seed}/{epoch}") + epoch * len(self)]


def permuted(index: int, size: int, seed: str) -> int:
    """Returns the position of `index` in a random permutation of [0, size).

    A Feistel network over the next even number of bits, walked until it returns into the range (Black and
    Rogaway, CT-RSA 2002).
    """
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for i in range(_ROUNDS):
            mixed = hashlib.blake2b(f"{seed}/{i}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
        index = left << half | right
        if index < size:
            return index


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
