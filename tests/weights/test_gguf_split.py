"""GGUF models in several files, as gguf.GGUFWriter and llama.cpp's gguf-split write them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_jax.errors import CheckpointError
from llama_jax.text.convert import convert
from llama_jax.tokenizer import load_tokenizer
from llama_jax.weights import load_params, open_source, read_gguf_metadata
from tests.weights.test_load import assert_same, one_line
from tests.weights.writers import CONFIG, random_params, split_gguf, write_gguf


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    whole = write_gguf(tmp_path / "whole.gguf", CONFIG, random_params(), kind="Q8_0")
    found = split_gguf(whole, tmp_path / "split", 12)
    assert [part.name for part in found[:2]] == ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf"]
    return found


def test_any_part_and_the_folder_open_the_whole_model(parts: list[Path], tmp_path: Path) -> None:
    whole = open_source(tmp_path / "whole.gguf")
    for path in (*parts, parts[0].parent):
        source = open_source(path)
        assert (source.path, source.config) == (parts[0], whole.config)
        assert source.tensors.keys() == whole.tensors.keys()
    assert_same(load_params(open_source(parts[-1])), load_params(whole))


def test_the_vocabulary_is_found_from_any_part(shared_data: Path, tmp_path: Path) -> None:
    whole = convert(shared_data / "stories260K" / "stories260K.bin", tmp_path / "whole.gguf")
    expected = load_tokenizer(whole)
    for path in split_gguf(whole, tmp_path / "split", 20):
        assert load_tokenizer(path).encode("Hello world") == expected.encode("Hello world")
        assert read_gguf_metadata(path)["general.architecture"] == "llama"
    config = open_source(tmp_path / "split").config
    assert load_tokenizer(tmp_path / "split").vocab_size == config.vocab_size == expected.vocab_size


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
