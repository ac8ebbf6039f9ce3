"""GGUF models in several files, as gguf.GGUFWriter and llama.cpp's gguf-split write them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

import llama_jax as lj
from llama_jax.errors import CheckpointError
from llama_jax.tokenizer import load_tokenizer
from llama_jax.weights import load_params, open_source, read_gguf_metadata
from tests.weights.test_load import assert_same, one_line
from tests.weights.writers import CONFIG, random_params, write_gguf


def split(path: Path, folder: Path, tensors: int) -> list[Path]:
    """Writes the model of `path` again in parts of so many tensors each."""
    folder.mkdir()
    model = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=tensors)
    for field in model.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            element = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element)
    for tensor in model.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    whole = write_gguf(tmp_path / "whole.gguf", CONFIG, random_params(), kind="Q8_0")
    found = split(whole, tmp_path / "split", 12)
    assert [part.name for part in found[:2]] == ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf"]
    return found


def test_any_part_and_the_folder_open_the_whole_model(parts: list[Path], tmp_path: Path) -> None:
    whole = open_source(tmp_path / "whole.gguf")
    for path in (*parts, parts[0].parent):
        source = open_source(path)
        assert (source.path, source.config) == (parts[0], whole.config)
        assert source.tensors.keys() == whole.tensors.keys()
    assert_same(load_params(open_source(parts[-1])), load_params(whole))


def test_the_vocabulary_is_found_from_any_part(smollm2_path: Path, tmp_path: Path) -> None:
    expected = load_tokenizer(smollm2_path)
    for path in split(smollm2_path, tmp_path / "split", 100):
        assert load_tokenizer(path).encode("Hello world") == expected.encode("Hello world")
        assert read_gguf_metadata(path)["general.architecture"] == "llama"
    model = lj.load(tmp_path / "split")
    assert model.tokenizer.vocab_size == model.config.vocab_size == expected.vocab_size


def removed(number: int) -> Callable[[list[Path]], object]:
    return lambda parts: parts[number].unlink()


def renamed(parts: list[Path]) -> None:
    for part in parts:
        part.rename(part.with_name(part.name.replace("-of-", "_of_")))


def exchanged(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])


@pytest.mark.parametrize(
    ("damage", "path", "message"),
    [
        (removed(0), "m-00002-of-00003.gguf", "whose first, m-00001-of-00003.gguf, is missing; add it"),
        (removed(1), "m-00001-of-00003.gguf", "parts are missing: m-00002-of-00003.gguf; add them"),
        (renamed, "m-00001_of_00003.gguf", "name them NAME-00001-of-00003.gguf"),
        (exchanged, "m-00001-of-00003.gguf", "says that it is part 2 of 3, not 3 of 3"),
    ],
)
def test_parts_that_are_not_a_model(
    damage: Callable[[list[Path]], object], path: str, message: str, parts: list[Path]
) -> None:
    damage(parts)
    with pytest.raises(CheckpointError) as caught:
        open_source(parts[0].with_name(path))
    assert message in one_line(caught)
