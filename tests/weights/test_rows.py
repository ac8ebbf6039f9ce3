"""Rows that are read by themselves are those of the whole: quantized, merged, changed and added ones.

A process on a mesh of several reads so; what is read is counted, since a whole matrix would pass too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.weights import adapters, load, open_source, quantized, source, torch_zip
from llama_jax.weights.derived import ResizedVocabulary
from llama_jax.weights.merged import Initial, Merged
from llama_jax.weights.names import EMBEDDING
from llama_jax.weights.tensors import ParamsTensors, StoredTensors
from tests.golden.quantized import FOLDER
from tests.random_models import random_model
from tests.weights import test_peft, test_peft_modules
from tests.weights.adapters import write


def check(tensors: Any) -> None:
    """Compares rows of every matrix with its own, bit for bit: from the first, across groups, to the last."""
    for entry in load.entries(tensors.config, "hf"):
        if len(entry.leaf.shape(tensors.config)) > 1:
            whole = tensors.read(entry.leaf, entry.layer)
            for begin, end in ((0, len(whole)), (3, min(17, len(whole))), (len(whole) - 5, len(whole))):
                rows = tensors.read_rows(entry.leaf, entry.layer, begin, end)
                assert rows.dtype == whole.dtype and np.array_equal(rows, whole[begin:end]), entry.name


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is read of files."""
    sizes: list[int] = []
    read = source.read_bytes

    def read_bytes(name: str, info: source.TensorInfo) -> np.ndarray:
        sizes.append(info.nbytes)
        return read(name, info)

    for module in (source, quantized, torch_zip):
        monkeypatch.setattr(module, "read_bytes", read_bytes)
    return sizes


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.iterdir()))
def test_quantized_matrices(name: str, counted: list[int]) -> None:
    """Half of the rows are half of the bytes, unless outputs are packed or the values are a list."""
    opened = open_source(FOLDER / name)
    check(StoredTensors(opened))
    infos = {k: v for k, v in opened.tensors.items() if isinstance(v, quantized.QuantizedInfo)}
    assert infos
    for tensor, info in infos.items():
        counted.clear()
        opened.read_rows(tensor, 0, info.shape[0] // 2)
        most = 1.0 if not info.by_rows else 0.6
        assert sum(counted) <= most * info.nbytes, tensor
    packed = name.startswith(("gptq", "awq", "nf4", "fp4", "compressed-int4-zeros"))
    assert all(bool(info.by_rows) != packed for info in infos.values()), name


@pytest.mark.parametrize("kind", [*test_peft.KINDS, "pissa"])
def test_merged_matrices(kind: str) -> None:
    settings = test_peft.KINDS.get(kind, test_peft.KINDS["lora"])
    config, params = random_model(5, test_peft.CONFIG)
    initial = {("wq", 1): Initial("pissa", 4, 1.0)} if kind == "pissa" else {}
    tree = test_peft.trained(settings, params)
    check(Merged(ParamsTensors(config, params), settings, tree, np.dtype("float16"), initial))


@pytest.mark.parametrize("case", test_peft_modules.CASES)
def test_changed_matrices(case: str, tmp_path: Path) -> None:
    config, params = random_model(5, test_peft_modules.tiny.CONFIG.replace(tie_word_embeddings=False))
    base = StoredTensors(open_source(lj.save(config, params, tmp_path / "base")))
    fields, stored, _ = test_peft_modules.CASES[case]
    tensors = test_peft_modules.PROJECTION | stored
    folder = write(tmp_path / "a", tensors, target_modules=["q_proj"], **fields)
    check(adapters.apply_adapter(base, folder)[0])


def test_added_words_take_the_table_once(tmp_path: Path, counted: list[int], monkeypatch) -> None:
    config, params = random_model(5, test_peft.CONFIG)
    opened = open_source(lj.save(config, params, tmp_path / "base"))
    monkeypatch.setattr("llama_jax.weights.derived._ROWS", 7)
    old, table = config.vocab_size, opened.tensors[EMBEDDING.hf].nbytes
    check(ResizedVocabulary(StoredTensors(opened), old - 3))
    resized = ResizedVocabulary(StoredTensors(opened), old + 9)
    check(resized)
    resized = ResizedVocabulary(StoredTensors(opened), old + 9)
    counted.clear()
    resized.read_rows(EMBEDDING, None, old + 1, old + 3)
    resized.read_rows(EMBEDDING, None, old + 3, old + 9)
    assert sum(counted) == table and max(counted) <= 7 * table // old
