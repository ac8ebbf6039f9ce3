"""Matrices whose rows are read by the devices in shares are those that are read whole."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from llama_jax.meshes import make_mesh
from llama_jax.weights import load, load_params, open_source
from llama_jax.weights.derived import ResizedVocabulary
from llama_jax.weights.tensors import StoredTensors
from tests.weights.test_load import LLAMA2C, WRITERS, assert_same
from tests.weights.writers import random_params

MESHES = {"hf-sharded": "data=2,fsdp=2,tensor=2", "gguf": "fsdp=2,context=4", "llama2c-2": "data=8"}


@pytest.mark.parametrize("writer", MESHES)
def test_rows_in_shares_are_the_whole(writer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a mesh of several processes: from the file, and of tensors derived from it."""
    params = random_params(LLAMA2C)
    source = open_source(WRITERS[writer](tmp_path, LLAMA2C, params))
    mesh, resized = make_mesh(MESHES[writer]), ResizedVocabulary(StoredTensors(source), 104)
    expected = load_params(source, mesh=mesh), load.load_tensors(resized, mesh=mesh, dtype="bfloat16")
    monkeypatch.setattr(Mesh, "is_multi_process", True)
    found = load_params(source, mesh=mesh), load.load_tensors(resized, mesh=mesh, dtype="bfloat16")
    assert_same(found, expected)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, expected)
    unstacked = load_params(source, mesh=mesh, scan_layers=False)["layers"]
    assert_same(jax.tree.map(lambda *x: np.stack(x), *unstacked), found[0]["layers"])


@pytest.mark.parametrize("writer", WRITERS)
def test_rows_of_every_format(writer: str, tmp_path: Path) -> None:
    source = open_source(WRITERS[writer](tmp_path, LLAMA2C, random_params(LLAMA2C)))
    tensors = StoredTensors(source)
    for name, info in source.tensors.items():
        if len(info.shape) == 2:
            assert np.array_equal(source.read_rows(name, 3, 17), source.read(name)[3:17])
    for leaf in load.entries(source.config, "hf"):
        if len(leaf.leaf.shape(source.config)) > 1:
            rows = tensors.read_rows(leaf.leaf, leaf.layer, 3, 17)
            assert np.array_equal(rows, tensors.read(leaf.leaf, leaf.layer)[3:17])
