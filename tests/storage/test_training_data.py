"""Training data in stores: the same documents, names and fingerprints as from the disk."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama_jax.cli import main
from llama_jax.errors import DataError
from llama_jax.storage import address
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.config.data import DataConfig
from llama_jax.train.data import indexing
from llama_jax.train.data.encode import Encoder
from llama_jax.train.data.files import find_files
from llama_jax.train.data.source import open_records, open_source
from tests.tokenizer import vocabularies
from tests.train.data.conftest import prepared

from .conftest import upload

TEXTS = [f"document number {number} " * (1 + number % 5) for number in range(60)]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Small files of every format, in folders."""
    root = tmp_path_factory.mktemp("data")
    for name in ("text", "lines", "compressed", "parquet", "arrow", "csv"):
        (root / name).mkdir()
    for part, texts in enumerate((TEXTS[:30], TEXTS[30:])):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / "text" / f"{part}.txt").write_text("\n".join(texts))
        (root / "lines" / f"{part}.jsonl").write_text(lines)
        (root / "compressed" / f"{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (root / "csv" / f"{part}.csv").write_text("text\n" + "".join(f"{text}\n" for text in texts))
        table = pa.table({"text": texts})
        pq.write_table(table, root / "parquet" / f"{part}.parquet", row_group_size=10)
        with pa.ipc.new_file(root / "arrow" / f"{part}.arrow", table.schema) as out:
            out.write_table(table)
    return root


def source(path, pattern="*"):
    return DataConfig(files=f"{path}/{pattern}").sources[0]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["text", "lines", "compressed", "parquet", "arrow", "csv"])
def test_every_format_reads_as_from_the_disk(kind, local, folder):
    there = upload(local / kind, folder / kind)
    here, stored = open_records(source(local / kind)), open_records(source(there))
    assert [file.name for file in stored.files] == [file.name for file in here.files]
    assert stored.counts.tolist() == here.counts.tolist() and stored.digest == here.digest
    assert [stored.text(i) for i in range(len(stored))] == [here.text(i) for i in range(len(here))]


def test_globs_and_folders(local, folder):
    there = upload(local / "lines", folder / "deep" / "lines")
    for pattern in (f"{folder}/**/*.jsonl", f"{folder}/deep/*/[01].jsonl", f"{there}/*"):
        files = find_files(DataConfig(files=pattern).sources[0])[0]
        assert [file.path.rpartition("/")[2] for file in files] == ["0.jsonl", "1.jsonl"]
    mixed = DataConfig(files=(f"{there}/0.jsonl", str(local / "lines" / "1.jsonl"))).sources[0]
    assert [[file.name for file in group] for group in find_files(mixed)] == [["0.jsonl"], ["1.jsonl"]]
    with pytest.raises(DataError, match="no file matches"):
        find_files(DataConfig(files=f"{folder}/none/*").sources[0])
    with pytest.raises(DataError, match=r"to match its files use '.*/lines/\*\*/\*.jsonl'"):
        open_records(DataConfig(files=str(there)).sources[0])


def test_an_object_that_changes_or_goes_is_found(local, folder, monkeypatch):
    monkeypatch.setattr(address, "_RECENT_SECONDS", 0.0)
    there = upload(local / "lines", folder)
    records = open_records(source(there))
    (there / "0.jsonl").write_bytes(b"other")
    with pytest.raises(DataError, match="changed during the run"):
        records.text(0)
    (there / "1.jsonl").unlink()
    with pytest.raises(DataError, match="can no longer be read"):
        records.text(len(records) - 1)


def test_prepared_token_ids_read_as_from_the_disk(local, folder, tmp_path):
    tokenizer = load_tokenizer(vocabularies.write_all(tmp_path)["sentencepiece"])
    prepared(tmp_path / "tokens", tokenizer, f"{local}/lines/*")
    there = upload(tmp_path / "tokens", folder / "tokens")
    here, stored = (
        open_source(DataConfig(files=str(path)).sources[0], Encoder(tokenizer))
        for path in (tmp_path / "tokens", there)
    )
    assert stored.fingerprint == here.fingerprint and len(stored) == len(here) == len(TEXTS)
    for number in range(len(TEXTS)):
        np.testing.assert_array_equal(stored.document(number).ids, here.document(number).ids)
    assert not list((tmp_path / "cache").rglob("*.copy"))  # by ranges, without a copy


def test_a_vocabulary_is_trained_from_and_into_a_store(local, folder, capsys):
    there = upload(local / "text", folder)
    main(["tokenizer", "train", f"{there}/*.txt", "--vocab-size", "290", "--out", str(there / "own.model")])
    assert load_tokenizer(str(there / "own.model")).vocab_size == 290
    assert capsys.readouterr().out == f"{there}/own.model\n"


def test_an_index_is_made_once_and_kept_beside_the_objects(local, folder, store, tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "SMALL_BYTES", 0)
    there = upload(local / "lines", folder / "lines")
    texts = [open_records(source(there)).text(i) for i in range(3)]
    assert [path.suffix for path in (there / ".llama_jax").iterdir()] == [".index"]
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "another machine"))
    monkeypatch.setattr(indexing.Making, "run", None)
    for pattern in ("*", "**/*"):  # no glob matches it
        records = open_records(source(there, pattern))
        assert [records.text(i) for i in range(3)] == texts and len(records) == len(TEXTS)
