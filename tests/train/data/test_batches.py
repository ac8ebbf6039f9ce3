"""Batches are a function of (seed, step), for any number of processes and after resuming."""

from __future__ import annotations

import itertools
import json
import time

import numpy as np
import pytest
from grain.experimental import LimitIterDataset, assert_equal_output_after_checkpoint

from llama_jax.errors import DataError
from llama_jax.train.data import Data, SourceConfig

NAMES = ("tokens", "segment_ids", "positions")


def take(batches, steps):
    return [next(batches) for _ in range(steps)]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert set(one) == set(other) == set(NAMES)
        for name in NAMES:
            np.testing.assert_array_equal(one[name], other[name])


def joined(parts):
    """The global batches, from those of each process."""
    return [
        {name: np.concatenate([part[name] for part in step]) for name in NAMES}
        for step in zip(*parts, strict=True)
    ]


def unpacked(rows):
    """The documents of a lane, from its rows; the last one may be incomplete."""
    ids = np.concatenate([row["tokens"] for row in rows]).tolist()
    starts = [i for i, token in enumerate(ids) if token == 1]  # BOS, which no text encodes to
    assert starts[0] == 0
    return [ids[a:b] for a, b in itertools.pairwise([*starts, len(ids)])]


def lane(batches, row):
    return [{name: batch[name][row] for name in NAMES} for batch in batches]


def test_a_batch_is_int32_and_full(opened, corpora):
    batch = next(opened(corpora["text"]).train())
    for name in NAMES:
        assert batch[name].shape == (4, 64)
        assert batch[name].dtype == np.int32
    assert batch["segment_ids"].min() == 1


def test_segments_are_numbered_and_positions_restart(opened, corpora):
    for batch in take(opened(corpora["text"]).train(), 10):
        for tokens, segments, positions in zip(*(batch[name] for name in NAMES), strict=True):
            begins = np.diff(segments, prepend=0)
            assert set(begins) <= {0, 1}
            assert begins[0] == 1
            np.testing.assert_array_equal(begins == 1, positions == 0)
            assert (np.diff(positions)[begins[1:] == 0] == 1).all()
            np.testing.assert_array_equal(
                tokens[1:] == 1, begins[1:] == 1
            )  # each document but the first starts with BOS


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_unpacking_gives_exactly_the_documents(opened, corpora, tokenizer, texts, batch_size):
    """Also with more rows (100) than documents (60)."""
    known = {(1, *tokenizer.encode(text, add_bos=False), 2) for text in texts}
    batches = take(opened(corpora["text"], batch_size=batch_size, validation_fraction=0).train(), 20)
    for row in range(batch_size):
        *whole, _ = unpacked(lane(batches, row))
        assert {tuple(document) for document in whole} <= known


def test_each_epoch_has_every_document_once_in_a_new_order(opened, corpora, tokenizer, texts):
    data = opened(corpora["text"], batch_size=1, seq_len=512, validation_fraction=0)
    documents = [tuple(ids) for ids in unpacked(lane(take(data.train(), 60), 0))]
    epochs = [documents[:60], documents[60:120]]
    for epoch in epochs:
        assert sorted(epoch) == sorted((1, *tokenizer.encode(text)[1:], 2) for text in texts)
    assert epochs[0] != epochs[1]


def test_the_order_is_a_function_of_the_seed(opened, corpora):
    first, again, other = (take(opened(corpora["text"], seed=seed).train(), 5) for seed in (7, 7, 8))
    assert_same(first, again)
    assert any((a["tokens"] != b["tokens"]).any() for a, b in zip(first, other, strict=True))


def test_without_shuffling_documents_are_in_file_order(opened, corpora, tokenizer, texts):
    data = opened(corpora["jsonl"], batch_size=1, validation_fraction=0, shuffle=False)
    *documents, _ = unpacked(lane(take(data.train(), 20), 0))
    expected = [[1, *tokenizer.encode(text, add_bos=False), 2] for text in texts]
    assert documents == expected[: len(documents)]


@pytest.mark.parametrize("count", [2, 4])
def test_the_global_batches_are_the_same_for_any_number_of_processes(opened, corpora, count):
    whole = take(opened(corpora["text"]).train(), 8)
    parts = [
        take(opened(corpora["text"], process_index=i, process_count=count).train(), 8) for i in range(count)
    ]
    assert_same(joined(parts), whole)


@pytest.mark.slow
def test_the_batches_are_the_same_with_worker_processes(opened, corpora):
    """With three workers requested: two is the largest number that divides four rows."""
    inside = opened(corpora["text"]).train()
    take(inside, 2)
    batches = opened(corpora["text"], workers=3).train()
    try:
        batches.restore([json.loads(json.dumps(inside.state()))])
        assert_same(take(batches, 6), take(inside, 6))
        assert batches.state() == inside.state()
        assert batches._workers == 2
    finally:
        batches.close()


@pytest.mark.parametrize("stop", [0, 1, 7])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 4), (4, 1), (2, 4)])
def test_resuming_is_exact_on_any_number_of_processes(opened, corpora, stop, before, after):
    def runs(count):
        return [opened(corpora["text"], process_index=i, process_count=count).train() for i in range(count)]

    uninterrupted = take(opened(corpora["text"]).train(), stop + 5)
    first = runs(before)
    for run in first:
        take(run, stop)
    time.sleep(0.02)  # prefetching continues, and must not affect the state
    states = json.loads(json.dumps([run.state() for run in first]))
    second = runs(after)
    for run in second:
        run.restore(states)
        assert len(run.state()["lanes"]) == 4 // after
    assert_same(joined([take(run, 5) for run in second]), uninterrupted[stop:])


def test_grains_checkpoint_check_passes(opened, corpora):
    data = opened(corpora["jsonl"], seq_len=32)
    assert_equal_output_after_checkpoint(
        LimitIterDataset(data.train()._make_lane_batches(range(4), None), 25)
    )


def test_a_state_of_another_batch_size_is_refused(opened, corpora):
    state = opened(corpora["text"]).train().state()
    with pytest.raises(
        DataError, match=r"is for batch size 4, and the run's is 8; resume with the train\.global_batch_size"
    ):
        opened(corpora["text"], batch_size=8).train().restore([state])
    half = opened(corpora["text"], process_index=1, process_count=2).train().state()
    with pytest.raises(
        DataError, match=r"lacks row 0 of the batch; restore with the states of every process"
    ):
        opened(corpora["text"]).train().restore([half])


@pytest.mark.parametrize(("length", "weight"), [(1000, 3.0), (120, 1.0), (40, 0.5)])
def test_weights_are_proportions_of_every_lanes_tokens(opened, tmp_path, length, weight):
    """For any document length and number of rows."""
    for name, text, copies in (("long", "x" * length, 50), ("short", "y" * 40, 50)):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{text}"}}\n' * copies)
    mixture = (
        SourceConfig(str(tmp_path / "long.jsonl"), weight=weight),
        SourceConfig(str(tmp_path / "short.jsonl"), weight=1),
    )
    data = opened(mixture=mixture, seq_len=512, batch_size=4)
    batches = take(data.train(), 40)
    decode = data._encode._tokenizer.decode
    for row in range(4):
        text = "".join(decode(rows["tokens"]) for rows in lane(batches, row))
        tokens = {
            c: text.count(c) * (length + 3 if c == "x" else 43) / (length if c == "x" else 40) for c in "xy"
        }
        assert tokens["x"] / sum(tokens.values()) == pytest.approx(weight / (weight + 1), abs=0.04)


def test_first_sources_of_lanes_follow_the_weights(opened, tmp_path):
    for name in "xy":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name * 500}"}}\n' * 50)
    mixture = [SourceConfig(str(tmp_path / f"{c}.jsonl"), weight=w) for c, w in (("x", 1), ("y", 3))]
    data = opened(mixture=mixture, batch_size=8)
    decode = data._encode._tokenizer.decode
    assert sorted(decode(row)[0] for row in next(data.train())["tokens"]) == list("xxyyyyyy")


def test_the_fingerprint_covers_everything_that_determines_the_batches(
    opened, tmp_path, corpora, texts, vocabulary_paths, tokenizer
):
    from llama_jax.tokenizer import load_tokenizer
    from tests.train.data.conftest import write_text

    here, there = write_text(tmp_path / "here", texts), write_text(tmp_path / "there" / "deep", texts)
    known = opened(here).fingerprint
    same = [
        opened(there).fingerprint,
        opened(here, seq_len=32, batch_size=2, seed=9, workers=2, bad_records="skip").fingerprint,
    ]
    assert set(same) == {known}
    other = load_tokenizer(vocabulary_paths["json-llama"])
    different = [
        opened(here, validation_fraction=0.2).fingerprint,
        opened(here, shuffle=False).fingerprint,
        opened(here, exclude=["*/007.txt"]).fingerprint,
        opened(here, tokenizer=other).fingerprint,
        opened(corpora["jsonl"]).fingerprint,
    ]
    (tmp_path / "here" / "003.txt").write_text("changed")
    different.append(opened(here).fingerprint)
    (tmp_path / "there" / "deep" / "003.txt").rename(tmp_path / "there" / "deep" / "003b.txt")
    different.append(opened(there).fingerprint)
    assert known not in different
    assert len(set(different)) == len(different)


def test_the_description_counts_everything(opened, corpora, texts):
    data: Data = opened(corpora["text"], validation_fraction=0.1)
    described = data.describe()
    assert described["documents"] == 60
    assert described["bytes"] == sum(len(text.encode()) for text in texts)
    assert 1 <= described["validation_documents"] < 20
    assert described["sources"][0]["files"] == corpora["text"]
    json.dumps(described)
