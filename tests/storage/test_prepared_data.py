"""`llama-jax data prepare` into stores: the bytes of a disk's, sent once, whatever kills the command."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest

from llama_jax.errors import DataError, StoreError
from llama_jax.storage.cache import cache_folder
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.prepare import job, local, shards
from llama_jax.train.prepare.steps import Settings
from tests.tokenizer import vocabularies
from tests.train.data.conftest import prepared


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """Many small chunks and shards, and a cache of the test's own."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(job, "_LEAST_CHUNK", 2000)
    monkeypatch.setattr(shards, "SHARD_BYTES", 800)


@pytest.fixture
def files(tmp_path):
    """60 documents, of which 10 occur twice."""
    texts = [f"document number {number} " * (1 + number % 5) for number in range(50)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts + texts[:10]]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    (tmp_path / "b.jsonl").write_text("".join(lines[:20]))
    return str(tmp_path / "a.jsonl")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(vocabularies.write_all(tmp_path_factory.mktemp("vocabularies"))["sentencepiece"])


def contents(out):
    """The files of a folder by name, on a disk or in a store."""
    paths = out.find() if hasattr(out, "find") else [path for path in out.rglob("*") if path.is_file()]
    return {"/".join(path.parts[len(out.parts) :]): path.read_bytes() for path in paths}


class Killed(BaseException):
    """What stops a command where it stands."""


@pytest.mark.parametrize("machine", ["same", "another"])
def test_a_killed_command_goes_on(tmp_path, folder, files, tokenizer, machine, monkeypatch):
    """No shard is sent again but a damaged one; the bytes are those of an unbroken command on a disk."""
    prepared(tmp_path / "whole", tokenizer, files, validation_fraction=0.1)
    whole = contents(tmp_path / "whole")
    names = {name for name in whole if name.endswith(".arrayrecord")}
    out, written, tokenized = folder / "out", [], []
    write_shard, write_chunk = local._write_shard, local._write_chunk

    def counted(job, shard):
        write_shard(job, shard)
        written.append(shard.name)
        if len(written) == 4:
            raise Killed

    monkeypatch.setattr(local, "_write_shard", counted)
    monkeypatch.setattr(local, "_write_chunk", lambda *given: (tokenized.append(given), write_chunk(*given)))
    with pytest.raises(Killed):
        prepared(out, tokenizer, files, validation_fraction=0.1)
    assert len(names) > 6 and not (out / "tokens.json").exists()
    assert {path.name for path in out.iterdir()} == {"prepare.json", "sent", *written}
    assert not list(cache_folder().rglob("*.arrayrecord"))
    damaged = out / written[0]
    damaged.write_bytes(bytes(damaged.info().size))
    if machine == "another":
        shutil.rmtree(cache_folder())
    first, written[:], tokenized[:] = written.copy(), [""] * 5, []
    notes = []
    manifests = prepared(out, tokenizer, files, validation_fraction=0.1, settings=Settings(note=notes.append))
    assert set(written[5:]) == names - set(first[1:]) and len(written[5:]) == len(names) - 3
    assert bool(tokenized) == (machine == "another")
    assert contents(out) == whole and manifests == [json.loads(whole["tokens.json"])]
    assert notes == [f"going on with {out}"] and not list((cache_folder() / "prepare").iterdir())
    again = prepared(out, tokenizer, files, validation_fraction=0.1, settings=Settings(note=notes.append))
    assert again == manifests and notes[1] == f"{out} is complete; there is nothing to do"


def test_folders_are_sent_and_their_manifests_last(tmp_path, folder, store, files, tokenizer):
    out = folder / "out"
    config = {"validation_files": files.replace("a.jsonl", "b.jsonl"), "validation_fraction": 0}
    if store.scheme == "s3":  # gcsfs names the object in the body
        refused = store.faults.injected("PUT .*tokens.json", 403)
        with refused, pytest.raises(StoreError, match="refuses access"):
            prepared(out, tokenizer, files, **config)
        assert not (out / "tokens.json").exists() and list(out.glob("*.arrayrecord"))
    prepared(out, tokenizer, files, **config)
    prepared(tmp_path / "whole", tokenizer, files, **config)
    assert pickle.loads(pickle.dumps(out)) == out  # to worker processes
    assert contents(out) == contents(tmp_path / "whole")


def test_what_is_not_ours_is_left_alone(folder, files, tokenizer):
    (folder / "out" / "thesis.txt").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"exists and was not begun by `llama-jax data prepare`; use another"):
        prepared(folder / "out", tokenizer, files)
    prepared(folder / "other", tokenizer, files)
    with pytest.raises(DataError, match=r"was begun with train\.seed = 0, and this is 1"):
        prepared(folder / "other", tokenizer, files, seed=1)
