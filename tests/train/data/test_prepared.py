"""Prepared data trains to the batches of its text, and a folder that is not what was written is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from grain.experimental import index_shuffle
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.errors import DataError
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.data import SourceConfig
from llama_jax.train.data.encode import Encoder
from llama_jax.train.data.layout import place_of, places_of
from llama_jax.train.data.source import open_source
from llama_jax.train.prepare import shards
from tests.train.data.conftest import WRITERS, prepared, write_jsonl
from tests.train.data.test_batches import assert_same, take

SPLIT = {"validation_fraction": 0.2}


def assert_same_validation(one, other):
    for left, right in zip(one.validation_batches(), other.validation_batches(), strict=True):
        assert left.pop("bytes") == right.pop("bytes")
        assert_same([left], [right])


@settings(deadline=None, max_examples=50)
@given(st.one_of(st.integers(1, 300), st.integers(65_000, 2**46)), st.integers(0, 2**32 - 1), st.data())
def test_the_place_of_a_document_is_the_inverse_of_grains_shuffle(count, seed, data):
    places = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=20))
    numbers = [index_shuffle(place, max_index=count - 1, seed=seed, rounds=4) for place in places]
    assert places_of(np.array(numbers), count, seed).tolist() == places
    assert [place_of(number, count, seed) for number in numbers] == places


@pytest.mark.parametrize("name", WRITERS)
def test_prepared_data_gives_the_batches_of_its_text(tmp_path, corpora, opened, tokenizer, name):
    """Over more than an epoch, with the seed it was prepared for and another, shuffled or not."""
    (manifest,) = prepared(tmp_path / "out", tokenizer, corpora[name], **SPLIT)
    assert (manifest["documents"], manifest["duplicates"]) == (60, 0)
    for run in ({"seed": 0}, {"seed": 5}, {"shuffle": False}):
        text, ours = (opened(files, **SPLIT, **run) for files in (corpora[name], str(tmp_path / "out")))
        assert ours.fingerprint == text.fingerprint
        assert_same(take(ours.train(), 16), take(text.train(), 16))
        assert_same_validation(ours, text)


def test_a_mixture_and_validation_files(tmp_path, corpora, opened, tokenizer, texts):
    weights, held_out = (1.0, 2.5), write_jsonl(tmp_path / "held", ["held out " + text for text in texts[:9]])
    sources = (
        SourceConfig(corpora["parquet"], weight=1.0),
        SourceConfig(write_jsonl(tmp_path / "other", ["other " + text for text in texts]), weight=2.5),
    )
    out = tmp_path / "out"
    manifests = prepared(out, tokenizer, mixture=sources, validation_files=held_out, seed=3)
    assert [manifest["documents"] for manifest in manifests] == [60, 60, 9]
    written = tuple(SourceConfig(str(out / str(i)), weight=weights[i]) for i in range(2))
    text = opened(mixture=sources, validation_files=held_out, seed=3)
    ours = opened(mixture=written, validation_files=str(out / "validation"), seed=3)
    assert_same(take(ours.train(), 16), take(text.train(), 16))
    assert_same_validation(ours, text)


def test_duplicates_and_skipped_records_are_as_if_empty(tmp_path, opened, tokenizer, texts):
    """Of copies one of the validation set stays if there is one, otherwise the first."""
    path, plain = tmp_path / "a.jsonl", tmp_path / "plain" / "a.jsonl"
    plain.parent.mkdir()
    lines = [json.dumps({"text": text}) for text in texts]
    for copy, original in ((7, 3), (9, 3), (40, 3), (31, 30)):
        lines[copy] = lines[original]
    path.write_text("\n".join([*lines[:20], "{", *lines[20:]]))
    run = {"bad_records": "skip", "validation_fraction": 0.3}
    (manifest,) = prepared(tmp_path / "out", tokenizer, str(path), **run)
    assert (manifest["duplicates"], manifest["skipped"]) == (4, {"not JSON": 1})
    assert manifest["documents"] == sum(manifest["lengths"].values()) == 56
    text = opened(str(path), **run)
    held_out = set(np.asarray(text._parts[0].validation_index).tolist())
    kept: dict[str, int] = {}
    records = path.read_text().split("\n")
    for i in sorted(range(61), key=lambda i: (i not in held_out, i)):
        kept.setdefault(records[i], i)
    records = [line if kept[line] == i else '{"text": ""}' for i, line in enumerate(records)]
    plain.write_text("\n".join(line if line != "{" else '{"text": ""}' for line in records))
    expected, ours = opened(str(plain), **run), opened(str(tmp_path / "out"), **run)
    assert ours.fingerprint != text.fingerprint
    assert_same(take(ours.train(), 16), take(expected.train(), 16))
    assert_same_validation(ours, expected)


def test_duplicates_stay_if_they_are_to(tmp_path, opened, tokenizer, texts):
    from llama_jax.train.prepare.steps import Settings

    files = write_jsonl(tmp_path / "twice", [*texts, *texts])
    (manifest,) = prepared(
        tmp_path / "out", tokenizer, files, settings=Settings(keep_duplicates=True), **SPLIT
    )
    assert (manifest["documents"], manifest["duplicates"]) == (120, 0)
    text, ours = opened(files, **SPLIT), opened(str(tmp_path / "out"), **SPLIT)
    assert ours.fingerprint == text.fingerprint
    assert_same(take(ours.train(), 8), take(text.train(), 8))


def test_the_first_epoch_reads_the_shards_in_order(tmp_path, corpora, opened, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1000)
    (manifest,) = prepared(tmp_path / "out", tokenizer, corpora["jsonl"], seed=7, **SPLIT)
    assert len(manifest["train"]) > 2 and len(manifest["validation"]) > 1
    data = opened(str(tmp_path / "out"), seed=7, **SPLIT)
    (order,) = data._mixture(7).orders
    readers = data._parts[0].source._readers
    read: list[tuple[int, int]] = []
    original = readers.read
    readers.read = lambda *where: read.append(where) or original(*where)
    count = len(data._parts[0].train_index)
    first = [order[i].tolist() for i in range(count)]
    assert read == sorted(set(read)) and len(read) == count
    second = [order[i].tolist() for i in range(count, 2 * count)]
    assert first != second and sorted(first) == sorted(second)


def test_prepared_documents_are_sent_to_workers(tmp_path, corpora, tokenizer):
    prepared(tmp_path / "out", tokenizer, corpora["jsonl"])
    source = open_source(SourceConfig(str(tmp_path / "out")), Encoder(tokenizer))
    source.document(0)
    other = pickle.loads(pickle.dumps(source))
    assert all(other.document(i).ids.tolist() == source.document(i).ids.tolist() for i in range(60))


def test_opening_reads_the_manifest_and_no_shard(tmp_path, corpora, tokenizer):
    prepared(tmp_path / "out", tokenizer, corpora["jsonl"])
    for path in (tmp_path / "out").glob("*.arrayrecord"):
        path.write_bytes(bytes(path.stat().st_size))  # the same size, all zero
    source = open_source(SourceConfig(str(tmp_path / "out")), Encoder(tokenizer))
    with pytest.raises(DataError, match=r"train-00000-of-00001\.arrayrecord cannot be read"):
        source.document(0)


def test_ids_of_another_tokenizer_or_split_are_refused(
    tmp_path, corpora, tokenizer, vocabulary_paths, opened
):
    prepared(tmp_path / "t", tokenizer, corpora["text"])
    other = load_tokenizer(vocabulary_paths["json-llama"])
    with pytest.raises(DataError, match=r"/t was prepared with another tokenizer or data\.parse_special; "):
        opened(str(tmp_path / "t"), tokenizer=other)
    with pytest.raises(DataError, match=r"validation_fraction = 0\.01, and the run has 0\.2; use the same"):
        opened(str(tmp_path / "t"), validation_fraction=0.2)
    with pytest.raises(DataError, match=r"0\.01, and the run has data\.validation_files; use the same"):
        opened(str(tmp_path / "t"), validation_files=corpora["jsonl"])


def change(**changes: object):
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "tokens.json").read_text())
        (folder / "tokens.json").write_text(json.dumps({**manifest, **changes}))

    return damage


SHARD = "train-00000-of-00001.arrayrecord"
DAMAGE = [
    (lambda folder: (folder / "tokens.json").write_text("{"), r"tokens\.json is not JSON"),
    (lambda folder: (folder / "tokens.json").write_text("[]"), r"was not written by this version"),
    (change(version=2), r"was not written by this version"),
    (change(seed=-1), r"was not written by this version"),
    (change(blocks={"sizes": [None], "window": 1}), r"was not written by this version"),
    (change(train=[["../x", 1, 1, ""]]), r"was not written by this version"),
    (lambda folder: (folder / SHARD).unlink(), SHARD + r" cannot be read \(No such file"),
    (lambda folder: (folder / SHARD).write_bytes(b"x"), SHARD + r" has 1 bytes, and had \d+"),
    (change(train=[]), r"none of the 1 records of '\S+' has usable text"),
]


@pytest.mark.parametrize("number", range(len(DAMAGE)))
def test_a_damaged_folder(tmp_path, corpora, tokenizer, opened, number):
    damage, message = DAMAGE[number]
    prepared(tmp_path / "t", tokenizer, corpora["text"])
    damage(tmp_path / "t")
    with pytest.raises(DataError, match=message) as raised:
        opened(str(tmp_path / "t"))
    assert "\n" not in str(raised.value)


def test_a_shard_with_fewer_records_than_the_manifest_says(tmp_path, corpora, tokenizer, opened):
    (manifest,) = prepared(tmp_path / "t", tokenizer, corpora["text"])
    name, records, *rest = manifest["train"][0]
    change(train=[[name, records + 50, *rest]])(tmp_path / "t")
    with pytest.raises(DataError, match=SHARD) as raised:
        take(opened(str(tmp_path / "t")).train(), 50)
    assert "\n" not in str(raised.value)
