"""Weights and tokenizers in stores: every format reads the same as from the disk, by ranges."""

from __future__ import annotations

import json

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.cli import main
from llama_jax.errors import LlamaJaxError, StoreError
from llama_jax.text.convert import convert
from llama_jax.tokenizer import load_tokenizer
from llama_jax.weights import open_source
from tests.tiny import write_model

from .conftest import upload

FORMATS = ("hf", "meta", "gguf", "llama2c", "orbax")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A model in every format, on the disk."""
    root = tmp_path_factory.mktemp("formats")
    model = write_model(root)
    for name in FORMATS:
        convert(model, root / (f"{name}.gguf" if name == "gguf" else name), name)
    return {name: root / (f"{name}.gguf" if name == "gguf" else name) for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_as_from_the_disk(local, folder, name):
    there = upload(local[name], folder / local[name].name)
    here, stored = open_source(local[name]), open_source(str(there))
    assert stored.config == here.config and list(stored.tensors) == list(here.tensors)
    assert str(stored.path).startswith(str(there))
    for tensor in list(here.tensors)[: 2 if name == "orbax" else None]:  # Orbax makes 50 requests for each
        np.testing.assert_array_equal(stored.read(tensor), here.read(tensor))
    text = "a cab back"
    assert load_tokenizer(str(there)).encode(text) == load_tokenizer(local[name]).encode(text)


def test_load_and_inspect_a_model_in_a_store(local, folder, store, capsys):
    there = str(upload(local["hf"], folder / "hf"))
    model, here = lj.load(there), lj.load(local["hf"])
    ids = here.tokenizer.encode("a cab")
    np.testing.assert_array_equal(
        lj.forward(model.config, model.params, np.array([ids])),
        lj.forward(here.config, here.params, np.array([ids])),
    )
    store.faults.log.clear()
    before = store.faults.bytes_sent
    main(["inspect", there, "--json"])
    assert json.loads(capsys.readouterr().out)["path"] == there
    size = sum(path.stat().st_size for path in local["hf"].iterdir())
    assert store.faults.bytes_sent - before < size + 40_000  # headers, each file once


def test_what_is_not_there_is_one_line(store, folder):
    for address, words in {
        str(folder / "none"): "there is no such object or folder",
        f"{store.scheme}://no-such-bucket/model": "there is no bucket 'no-such-bucket'",
    }.items():
        with pytest.raises(LlamaJaxError) as caught:
            lj.load(address)
        assert words in str(caught.value) and address in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_extra_is_named(monkeypatch):
    from llama_jax.storage import client

    for address, extra in {"gs://bucket/a": "gcs", "s3://bucket/a": "s3"}.items():
        client._make.cache_clear()
        monkeypatch.setitem(client._PACKAGES, address[:2], "a_package_that_is_missing")
        with pytest.raises(StoreError, match=rf"pip install 'llama-jax\[{extra}\]'"):
            open_source(address)
    client._make.cache_clear()


@pytest.mark.parametrize("name", FORMATS)
def test_a_model_is_converted_into_a_store(local, folder, name, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    target = folder / "model.gguf" if name == "gguf" else folder / "model"
    main(["convert", str(local["hf"]), str(target), "--to", name])
    here, stored = open_source(local[name]), open_source(str(target))
    assert stored.format == name and list(stored.tensors) == list(here.tensors)
    tensor = next(iter(here.tensors))
    np.testing.assert_array_equal(stored.read(tensor), here.read(tensor))
    assert not list((tmp_path / "uploads").iterdir())
    with pytest.raises(LlamaJaxError, match="already exists"):
        convert(local["hf"], str(target), name)


def test_an_upload_that_fails_is_resumed_and_is_no_model(local, folder, store, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    model = lj.load(local["hf"])
    with (
        store.faults.injected(r"(POST|PUT) .*safetensors", 403),
        pytest.raises(StoreError, match=r"refuses access.*what was written is kept in"),
    ):
        lj.save(model, str(folder / "saved"))
    assert not (folder / "saved" / "config.json").exists()
    assert (folder / "saved").is_dir()
    lj.save(model, str(folder / "saved"))
    np.testing.assert_array_equal(
        open_source(str(folder / "saved")).read("model.norm.weight"),
        open_source(local["hf"]).read("model.norm.weight"),
    )
