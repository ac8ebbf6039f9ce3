"""Orders of more documents than Grain's shuffle can number."""

from __future__ import annotations

import pytest

from llama_jax.train.data import order
from llama_jax.train.data.order import permuted


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_each_place_has_one_document(size):
    first, second = ([permuted(i, size, seed) for i in range(size)] for seed in ("0/0", "0/1"))
    assert sorted(first) == sorted(second) == list(range(size))
    if size >= 16:
        assert first != second
        assert sum(a == b for a, b in zip(first, range(size), strict=True)) < size / 4


def test_numbers_of_more_than_32_bits_are_spread_over_all():
    size = 10**10
    found = [permuted(i, size, "7") for i in range(200)]
    assert len(set(found)) == 200 and 0 <= min(found) < size / 20 and size * 19 / 20 < max(found) < size
    assert 60 < sum(place < size // 2 for place in found) < 140


def test_an_epoch_has_each_document_once_in_an_order_of_its_own(opened, corpora, monkeypatch):
    monkeypatch.setattr(order, "_MAX_SHUFFLED", 0)
    (documents,) = opened(corpora["jsonl"], validation_fraction=0)._mixture(3).orders
    epochs = [[tuple(documents[i]) for i in range(first, first + 60)] for first in (0, 60)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and len(set(epochs[0])) == 60
    assert epochs[0] != epochs[1]
