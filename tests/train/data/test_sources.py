"""Every file format gives the same documents."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from llama_jax.errors import DataError
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.data import DataConfig, SourceConfig, train_texts
from llama_jax.train.data.encode import Encoder
from llama_jax.train.data.pieces import DOCUMENT_BYTES
from llama_jax.train.data.records import BadRecord
from llama_jax.train.data.source import open_records
from tests.tokenizer.conftest import KINDS
from tests.train.data.conftest import WRITERS, write_arrayrecord, write_parquet
from tests.train.data.test_batches import take


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_documents(corpora, texts, name):
    records = open_records(SourceConfig(corpora[name]))
    assert [records.text(i) for i in range(len(records))] == texts
    records = pickle.loads(pickle.dumps(records))  # as sent to a worker process
    assert records.text(len(texts) - 1) == texts[-1]


def test_arrayrecords_of_json_objects(tmp_path, texts):
    records = open_records(SourceConfig(write_arrayrecord(tmp_path / "a", texts, wrap=True)))
    assert [records.text(i) for i in range(len(records))] == texts


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_trains_and_evaluates(opened, corpora, texts, name):
    data = opened(corpora[name], validation_fraction=0.2)
    batches = take(data.train(), 3)
    assert all((batch["segment_ids"] > 0).all() for batch in batches)
    assert data.describe()["documents"] == len(texts)
    assert next(data.validation_batches())["tokens"].any()


@pytest.mark.parametrize("name", ["parquet", "arrow", "arrayrecord"])
def test_evaluation_can_read_while_training_prefetches(corpora, texts, name, monkeypatch):
    """Threads share open files and decoded row groups, here with a cache of two."""
    small_windows(monkeypatch, 1)
    monkeypatch.setattr("llama_jax.train.data.tables._OPEN_FILES", 1)
    monkeypatch.setattr("llama_jax.train.data.arrow._MAPS", 1)
    records = open_records(SourceConfig(corpora[name]))
    with ThreadPoolExecutor(4) as pool:
        orders = [range(60), range(59, -1, -1)] * 6
        for order, read in zip(orders, pool.map(lambda o: [records.text(i) for i in o], orders), strict=True):
            assert read == [texts[i] for i in order]


@pytest.mark.parametrize(
    "text",
    [
        "line of text\n" * 20_000,
        "x" * 200_000,
        "é" * 100_001,
        "a" + "🦙" * 60_000,
        "\r\n".join("word" for _ in range(50_000)),
        ("y" * DOCUMENT_BYTES + "\n") * 3,
    ],
    ids=["lines", "no line end", "two bytes", "four bytes", "crlf", "line end beyond"],
)
def test_text_is_split_into_documents_that_join_to_the_original(tmp_path, text):
    path = tmp_path / "big.txt"
    path.write_text(text, encoding="utf-8", newline="")
    records = open_records(SourceConfig(str(path)))
    pieces = [records.text(i) for i in range(len(records))]
    assert "".join(pieces) == text
    assert max(len(piece.encode()) for piece in pieces) <= DOCUMENT_BYTES
    assert len(pieces) >= len(text.encode()) // DOCUMENT_BYTES
    if "line" in text:
        assert all(piece.endswith("\n") for piece in pieces)


def test_files_without_text_are_no_documents(tmp_path):
    for name, text in (("a.txt", ""), ("b.txt", "  \n\n"), ("c.txt", "text")):
        (tmp_path / name).write_text(text)
    records = open_records(SourceConfig(f"{tmp_path}/*.txt"))
    assert [records.text(i) for i in range(len(records))] == ["text"]


def test_globs_reach_into_folders_and_exclude(tmp_path):
    for name in ("a.py", "sub/b.py", "sub/test/c.py", "sub/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    config = DataConfig(files=f"{tmp_path}/**/*.py", exclude=("*/test/*",), validation_fraction=0)
    assert list(train_texts(config)) == ["a.py", "sub/b.py"]


def test_the_standard_library_is_a_corpus():
    records = open_records(SourceConfig("{stdlib}/json/*.py"))
    assert "JSONDecoder" in "".join(records.text(i) for i in range(len(records)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_encoder_is_equivalent(vocabulary_paths, kind):
    """Control tokens spelled in the text stay text, a setting that a pickled tokenizers.Tokenizer loses."""
    encoder = Encoder(load_tokenizer(vocabulary_paths[kind]))
    other = pickle.loads(pickle.dumps(encoder))
    text = "the <s> fox </s> <|im_end|> is <|endoftext|> here"
    np.testing.assert_array_equal(encoder(text), other(text))
    assert encoder.fingerprint == other.fingerprint


def test_documents_are_bos_ids_eos(tokenizer, vocabulary_paths):
    assert Encoder(tokenizer)("the fox").tolist() == [1, *tokenizer.encode("the fox", add_bos=False), 2]
    without_bos = load_tokenizer(vocabulary_paths["gguf-bpe"])
    assert Encoder(without_bos)("fox").tolist() == [*without_bos.encode("fox"), without_bos.eos_id]


def small_windows(monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
    """Lets so many row groups be shuffled together."""
    monkeypatch.setattr("llama_jax.train.data.tables._WINDOW_BYTES", 1)
    monkeypatch.setattr("llama_jax.train.data.tables._LEAST_WINDOW", blocks)


@pytest.mark.parametrize("window", [1, 2, 3, 20])
def test_shuffled_parquet_reads_each_row_group_once(tmp_path, texts, opened, window, monkeypatch):
    small_windows(monkeypatch, window)
    data = opened(write_parquet(tmp_path / "p", texts), validation_fraction=0, batch_size=1)
    (order,) = data._mixture(3).orders
    groups = []
    records = data._parts[0].source.records
    original = records._read_group
    records._read_group = lambda *where: groups.append(where) or original(*where)
    records._groups = type(records._groups)(2 * records.blocks.window)  # nothing read yet
    first = [tuple(order[i]) for i in range(60)]
    assert len(groups) == len(set(groups)) == 10
    second = [tuple(order[i]) for i in range(60, 120)]
    assert len(groups) <= 20
    assert sorted(first) == sorted(second)
    assert first != second


def test_sorted_parquet_is_shuffled_across_row_groups(tmp_path, opened):
    """One class after the other, as IMDb is: in the first of many row groups there is but one."""
    texts = [f"{label} {i}" for label in ("bad", "good") for i in range(500)]
    orders = {}
    for name, write in (("parquet", write_parquet), ("jsonl", WRITERS["jsonl"])):
        data = opened(write(tmp_path / name, texts), validation_fraction=0, batch_size=1)
        (order,) = data._mixture(3).orders
        source = data._parts[0].source
        places = [source.document(i).ids.tobytes() for i in range(1000)]
        position = {ids: i for i, ids in enumerate(places)}
        orders[name] = np.array([position[order[i].tobytes()] for i in range(1000)])
    for order in orders.values():
        assert sorted(order) == list(range(1000))
        shares = (order.reshape(20, 50) >= 500).mean(1)
        assert 0.2 < shares.min() < shares.max() < 0.8
        assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1


@pytest.mark.parametrize("form", ["array", "indented", "lines", "empty"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n "])
def test_json_files_hold_objects_by_line_or_in_an_array(form, start, tmp_path, texts):
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)] * (form != "empty")
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    indent = 4 if form == "indented" else None
    content = lines if form == "lines" else json.dumps(rows, indent=indent, ensure_ascii=False) + "\n"
    (tmp_path / "a.json").write_text(start + content, encoding="utf-8", newline="")
    records = open_records(SourceConfig(str(tmp_path / "a.json")))
    assert [records.text(i) for i in range(len(records))] == [row["text"] for row in rows]
    assert [records.row(i) for i in range(len(records))] == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}', "not a JSON array (an element is not followed by"),
        (b'[{"text": "a"} {"text": "b"}]', "not a JSON array (an element is not followed by"),
        (b'[{"text": "a"}] more', "not a JSON array (text follows the array)"),
        (b"[" * 100_000, "not a JSON array ("),
        (b"[\xff]", "not a JSON array ("),
    ],
)
def test_a_file_that_begins_like_an_array_and_is_none(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_records(SourceConfig(str(tmp_path / "a.json")))
    assert f"{tmp_path / 'a.json'}: {message}" in str(caught.value)


def test_an_element_that_is_no_object_is_a_bad_record(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"},\n 3]')
    records = open_records(SourceConfig(str(tmp_path / "a.json")))
    with pytest.raises(BadRecord, match=r"a\.json:2: a JSON int, not an object"):
        records.row(1)


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffHello", encoding="utf-8")
    assert open_records(SourceConfig(str(tmp_path / "a.txt"))).text(0) == "Hello"
