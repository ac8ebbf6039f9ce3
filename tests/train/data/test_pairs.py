"""Precomputed reference log-probabilities: computed once per record, and kept with their pair."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llama_jax.train.data import SourceConfig
from tests.train.data.test_batches import take

NAMES = ("tokens", "segment_ids", "positions", "mask", "value", "reference")
BAD, TOO_LONG = 3, 7  # records of the first file


def write(path, count, name):
    rows = [
        {"prompt": f"{name} {i}", "chosen": " yes" * (1 + i % 5), "rejected": f" no {'x' * (i % 7)}"}
        for i in range(count)
    ]
    if name == "first":
        rows[BAD]["rejected"] = rows[BAD]["chosen"]
        rows[TOO_LONG]["chosen"] = " yes" * 200
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return {
        name: write(folder / f"{name}.jsonl", n, name)
        for name, n in (("first", 20), ("more", 9), ("test", 6))
    }


@pytest.fixture
def pairs(opened, files):
    """A mixture of two files, and a validation file: records 0 to 19, 20 to 28, and 29 to 34."""

    def open_(**settings):
        sources = tuple(SourceConfig(files[name], weight=w) for name, w in (("first", 2.0), ("more", 1.0)))
        chosen = {
            "objective": "dpo",
            "seq_len": 128,
            "bad_records": "skip",
            "validation_files": files["test"],
        }
        return opened(**{"mixture": sources, **chosen, **settings})

    return open_


TABLE = np.arange(70, dtype=np.float32).reshape(35, 2) - 100.5
TABLE[[BAD, TOO_LONG, 11, 30]] = np.nan
USABLE = set(range(35)) - {BAD, TOO_LONG}


def known(data):
    """The record of each pair, by its tokens."""
    found, start = {}, 0
    for part in data._all_parts:
        usable = [i for i in range(len(part.source)) if start + i in USABLE]
        for i in usable:
            found[tuple(tuple(s.ids.tolist()) for s in part.source.example(i).segments)] = start + i
        start += len(part.source)
    assert len(found) == len(USABLE)
    return found


def pair_values(batches, name):
    """Each pair's tokens, and an array's values at its two last tokens; elsewhere the array must be 0."""
    for batch in batches:
        for ids, segments, numbers in zip(batch["tokens"], batch["segment_ids"], batch[name], strict=True):
            at = [np.flatnonzero(segments == s) for s in range(1, segments.max() + 1)]
            ends = [places[-1] for places in at]
            assert not np.delete(numbers, ends).any()
            answers = [tuple(ids[places].tolist()) for places in at]
            yield from zip(two(answers), two(numbers[ends].tolist()), strict=True)


def two(items):
    return list(zip(items[::2], items[1::2], strict=True))


def joined(parts, names=NAMES):
    return [{n: np.concatenate([p[n] for p in step]) for n in names} for step in zip(*parts, strict=True)]


def assert_same(first, second, names=NAMES):
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        for name in names:
            np.testing.assert_array_equal(one[name], other[name])


def test_every_record_appears_once_with_its_number(pairs):
    data = pairs()
    assert data.records == 35
    records = known(data)
    asked = [(records[answers], place) for answers, place in pair_values(data.pairs(), "place")]
    assert sorted(record for record, _ in asked) == sorted(USABLE)
    assert all(place == (1 + 2 * record, 2 + 2 * record) for record, place in asked)
    assert data.location(19).endswith("first.jsonl:20") and data.location(20).endswith("more.jsonl:1")
    assert data.location(34).endswith("test.jsonl:6")


@pytest.mark.parametrize("count", [2, 4])
def test_pairs_and_batches_do_not_depend_on_the_number_of_processes(pairs, count):
    names = ("tokens", "segment_ids", "positions", "mask", "place")
    parts = [pairs(process_index=i, process_count=count) for i in range(count)]
    assert_same(joined([list(p.pairs()) for p in parts], names), list(pairs().pairs()), names)
    trained = [take(part.with_reference(TABLE).train(), 8) for part in parts]
    assert_same(joined(trained), take(pairs().with_reference(TABLE).train(), 8))


def test_reference_values_stay_with_their_pairs_and_records_without_are_skipped(pairs):
    plain = pairs()
    data, records = plain.with_reference(TABLE), known(plain)
    batches = data.train()
    seen = [(records[answers], n) for answers, n in pair_values(take(batches, 20), "reference")]
    assert all(numbers == tuple(TABLE[record]) for record, numbers in seen)
    counts = np.bincount([record for record, _ in seen], minlength=35)
    assert counts.max() > 2
    assert set(np.flatnonzero(counts)) == USABLE - {11} - set(range(29, 35))
    assert batches.skipped["no reference"] > 0
    held = [(records[answers], n) for answers, n in pair_values(data.validation_batches(), "reference")]
    assert sorted(held) == [(r, tuple(TABLE[r])) for r in range(29, 35) if r != 30]
    assert data.validation_skipped == {"no reference": 1}
    assert "reference" not in next(plain.train())


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (2, 1)])
def test_resuming_keeps_reference_values(pairs, before, after):
    def runs(count):
        parts = [pairs(process_index=i, process_count=count) for i in range(count)]
        return [part.with_reference(TABLE).train() for part in parts]

    first, second = runs(before), runs(after)
    for run in first:
        take(run, 5)
    states = json.loads(json.dumps([run.state() for run in first]))
    for run in second:
        run.restore(states)
    whole = take(pairs().with_reference(TABLE).train(), 9)
    assert_same(joined([take(run, 4) for run in second]), whole[5:])


@pytest.mark.slow
def test_reference_values_with_worker_processes(pairs):
    batches = pairs(workers=1).with_reference(TABLE).train()
    try:
        assert_same(take(batches, 4), take(pairs().with_reference(TABLE).train(), 4))
    finally:
        batches.close()


def test_the_fingerprint_covers_everything_that_determines_the_values(pairs, files):
    alike = [{}, {"seed": 3}, {"batch_size": 2}, {"workers": 1}, {"shuffle": False}]
    assert len({pairs(**settings).pairs_fingerprint for settings in alike}) == 1
    other = [{"seq_len": 64}, {"too_long": "truncate"}, {"validation_files": ""}, {"objective": "reward"}]
    other += [{"mixture": (SourceConfig(files["first"]),)}]
    assert len({pairs(**settings).pairs_fingerprint for settings in [{}, *other]}) == len(other) + 1
    assert (
        pairs(validation_files="", validation_fraction=0.5).pairs_fingerprint
        == pairs(validation_files="").pairs_fingerprint
    )
