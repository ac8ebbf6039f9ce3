"""Where a prepared document lies: the places of a shuffled epoch, from the document's number alone.

The shards of a prepared folder (prepared.py) hold their documents in the order of the first epoch, so that
this epoch reads them from front to back. Any other epoch, seed or process asks for documents by their number.
Grain's shuffle maps places to numbers; the inverse here maps numbers to places, with no table of either.

Grain's permutation of 0 ... n - 1 is a Feistel network with Simon's round function (Beaulieu et al., IACR
ePrint 2013/404) on words of half the bits of n - 1, at least 8; what falls outside of the range is encrypted
again until it falls inside (Black and Rogaway, CT-RSA 2002). Its round keys are those of C++'s
`std::seed_seq`. Backwards, the rounds are undone in reverse order, again until inside.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

_ROUNDS = 4
_LEAST_BITS = 16
_SMALL = 1 << _LEAST_BITS
_MASK = 0xFFFFFFFF


def place_of(number: int, count: int, seed: int) -> int:
    """Returns the place of document `number` of `count` in the first epoch's order.

    It is the inverse of `grain.experimental.index_shuffle(place, max_index=count - 1, seed=seed, rounds=4)`.

    Args:
      number: at least 0, below `count`.
      count: number of documents, below 2^47.
      seed: the shuffle's, 32 bits.
    """
    if count <= _SMALL:
        return int(_places(count, seed)[number])
    place = _decrypt(number, count - 1, seed)
    while place >= count:
        place = _decrypt(place, count - 1, seed)
    return int(place)


def places_of(numbers: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Returns `place_of` each of `numbers`, int64 [n], as int64 [n]."""
    if count <= _SMALL:
        return _places(count, seed)[numbers]
    places = numbers.astype(np.uint64)
    pending = np.arange(len(places))
    while len(pending):
        places[pending] = _decrypt(places[pending], count - 1, seed)
        pending = pending[places[pending] >= count]
    return places.astype(np.int64)


@functools.lru_cache(8)
def _places(count: int, seed: int) -> np.ndarray:
    """Returns `place_of` every document, int64 [count]: in the cipher's least block most of it is walking."""
    numbers = [index_shuffle(place, max_index=count - 1, seed=seed, rounds=_ROUNDS) for place in range(count)]
    return np.argsort(numbers)


def _decrypt(value: Any, max_index: int, seed: int) -> Any:
    """Decrypts one number, or uint64 [n] of them."""
    bits = max((max_index - 1).bit_length(), _LEAST_BITS)  # ceil(log2(max_index))
    word = (bits + 1) // 2
    mask = (1 << word) - 1

    def mixed(x: Any, key: int) -> Any:
        by_1, by_8, by_2 = (((x << n) | (x >> (word - n))) & mask for n in (1, 8, 2))
        return (by_1 & by_8) ^ by_2 ^ (key & mask)

    left, right = value >> word, value & mask
    keys = _round_keys(seed, _ROUNDS)
    for first, second in zip(keys[-2::-2], keys[::-2], strict=True):
        right = right ^ mixed(left, second)
        left = left ^ mixed(right, first)
    return (left << word) | right


@functools.lru_cache(8)
def _round_keys(seed: int, count: int) -> tuple[int, ...]:
    """Returns what `std::seed_seq{seed}` generates: `count` keys of 32 bits (C++20, rand.util.seedseq)."""
    seeds = (seed,)
    keys = [0x8B8B8B8B] * count
    t = (count - 1) // 2 if count < 7 else 3
    p = (count - t) // 2
    q = p + t
    steps = max(len(seeds) + 1, count)
    for k in range(steps):
        x = keys[k % count] ^ keys[(k + p) % count] ^ keys[(k - 1) % count]
        first = 1664525 * (x ^ (x >> 27)) & _MASK
        added = len(seeds) if k == 0 else k % count + (seeds[k - 1] if k <= len(seeds) else 0)
        second = (first + added) & _MASK
        keys[(k + p) % count] = (keys[(k + p) % count] + first) & _MASK
        keys[(k + q) % count] = (keys[(k + q) % count] + second) & _MASK
        keys[k % count] = second
    for k in range(steps, steps + count):
        x = (keys[k % count] + keys[(k + p) % count] + keys[(k - 1) % count]) & _MASK
        first = 1566083941 * (x ^ (x >> 27)) & _MASK
        second = (first - k % count) & _MASK
        keys[(k + p) % count] ^= first
        keys[(k + q) % count] ^= second
        keys[k % count] = second
    return tuple(keys)
