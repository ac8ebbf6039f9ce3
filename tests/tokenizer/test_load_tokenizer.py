"""load_tokenizer: which file it loads for a path."""

from __future__ import annotations

import os
import shutil
import struct
from pathlib import Path

import pytest

from llama_jax.errors import LlamaJaxError, TokenizerError
from llama_jax.tokenizer import load_tokenizer
from llama_jax.weights import open_source
from tests.tokenizer import vocabularies


def model_bin(path: Path, vocab_size: int) -> Path:
    """A llama2.c model of zeros."""
    dim, hidden, layers, heads, length = 8, 16, 1, 2, 4
    rope = length * dim // heads
    values = vocab_size * dim + layers * (2 * dim + 4 * dim * dim + 3 * dim * hidden) + dim + rope
    header = struct.pack("<7i", dim, hidden, layers, heads, heads, vocab_size, length)
    path.write_bytes(header + bytes(4 * values))
    return path


@pytest.mark.parametrize("kind", ["sentencepiece", "llama2c", "gguf-bpe", "json-bpe"])
def test_directory_and_str(vocabulary_paths: dict[str, Path], kind: str) -> None:
    path = vocabulary_paths[kind]
    ids = load_tokenizer(path).encode("the fox")
    assert load_tokenizer(path.parent).encode("the fox") == ids
    assert load_tokenizer(str(path)).encode("the fox") == ids


def test_most_specific_format_of_a_directory(vocabulary_paths: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(vocabulary_paths["json-bpe"], tmp_path)
    shutil.copy(vocabulary_paths["sentencepiece"], tmp_path)
    shutil.copy(vocabulary_paths["gguf-spm"], tmp_path)
    assert "<|endoftext|>" in load_tokenizer(tmp_path).special_tokens
    (tmp_path / "tokenizer.json").unlink()
    assert load_tokenizer(tmp_path).special_tokens == {"<s>": 1, "</s>": 2}


def test_llama2c_model_uses_the_vocabulary_of_its_size(
    vocabulary_paths: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(vocabulary_paths["llama2c"], tmp_path / "tokenizer.bin")
    model = model_bin(tmp_path / "model.bin", 340)
    assert load_tokenizer(model).vocab_size == 340
    rows = vocabularies.pieces(vocabularies.sentencepiece_model())
    (tmp_path / "tok300.bin").write_bytes(vocabularies.llama2c(rows[:300]))
    assert load_tokenizer(model).vocab_size == 340
    assert load_tokenizer(model_bin(tmp_path / "small.bin", 300)).vocab_size == 300
    other = model_bin(tmp_path / "other.bin", 77)
    with pytest.raises(
        TokenizerError, match=r"other\.bin has a vocabulary of 77; none of tok300\.bin, tokenizer\.bin"
    ):
        load_tokenizer(other)
    with pytest.raises(
        TokenizerError, match=r"contains several tokenizers \(tok300\.bin, tokenizer\.bin\); give the"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.bin").write_bytes(b"123")
    with pytest.raises(TokenizerError, match=r"cannot determine which tokenizer is the model's.*broken\.bin"):
        load_tokenizer(tmp_path / "broken.bin")


@pytest.mark.parametrize(
    "name", ["a.model", "tokenizer.json", "tok.bin", "model.bin", "a.gguf", "no/such/tok.bin"]
)
def test_missing_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(TokenizerError) as raised:
        load_tokenizer(tmp_path / name)
    message = str(raised.value)
    assert str(tmp_path / name) in message
    assert "does not exist" in message or "no such file" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer", "vocab.txt"])
def test_name_is_not_of_a_tokenizer(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(TokenizerError, match=r"is not named like a tokenizer file; give a tokenizer\.json"):
        load_tokenizer(tmp_path / name)


def test_directory_without_a_tokenizer(tmp_path: Path) -> None:
    for path in (tmp_path, model_bin(tmp_path / "model.bin", 7)):
        with pytest.raises(
            TokenizerError, match=r"has no tokenizer \(tokenizer\.json, tokenizer\.model, tok\*\.bin"
        ):
            load_tokenizer(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "a.model", "tok.bin", "a.gguf"])
def test_path_is_not_a_regular_file(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(TokenizerError, match="not a regular file"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize("name", ["tokenizer.json", "a.model", "tok.bin"])
def test_too_large_file_is_not_read(tmp_path: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(TokenizerError, match=r"has 1099511627776 bytes; no tokenizer has more than 67108864"):
        load_tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "reason"), [("a" * 5000 + ".model", "File name too long"), ("~nobody-has-it/x.model", "home")]
)
def test_invalid_path(path: str, reason: str) -> None:
    for load in (load_tokenizer, open_source):
        with pytest.raises(LlamaJaxError, match=reason) as caught:
            load(path)
        assert "\n" not in str(caught.value)
