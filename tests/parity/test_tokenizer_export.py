"""Live comparison with transformers: the tokenizer files that we write encode there as they do here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.export import vocabulary_of
from llama_jax.tokenizer.train import train_sentencepiece
from tests.tokenizer import corpus, vocabularies

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")


@pytest.fixture(params=["llama2", "smollm2", "stories260K", "trained"])
def tokenizer(request: pytest.FixtureRequest, shared_data: Path, tmp_path: Path) -> Tokenizer:
    match request.param:
        case "llama2":
            return load_tokenizer(shared_data / "llama2" / "tokenizer.model")
        case "smollm2":
            return load_tokenizer(request.getfixturevalue("smollm2_path"))
        case "stories260K":
            return load_tokenizer(shared_data / "stories260K" / "tok512.bin")
        case _:
            texts = [(shared_data / "text" / "tinyshakespeare.txt").read_text(), *vocabularies.TEXT]
            return load_tokenizer(train_sentencepiece(texts, tmp_path / "tokenizer.model", vocab_size=1000))


@pytest.fixture
def theirs(tokenizer: Tokenizer, tmp_path: Path) -> Any:
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, data in vocabulary_of(tokenizer, "hf").files.items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_autotokenizer_encodes_and_decodes_as_we_do(tokenizer: Tokenizer, theirs: Any) -> None:
    lines = corpus.lines()[::3]
    for line, ids in zip(lines, theirs(lines)["input_ids"], strict=True):
        assert tokenizer.encode(line) == ids, line
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), line
    names = list(tokenizer.special_tokens)
    for i, line in enumerate(lines[:500]):
        text = f"{names[i % len(names)]}{line}{names[i * 7 % len(names)]} {line}"
        assert tokenizer.encode(text, add_bos=False, parse_special=True) == theirs.encode(
            text, add_special_tokens=False
        ), text


def test_autotokenizer_knows_the_roles(tokenizer: Tokenizer, theirs: Any) -> None:
    assert len(theirs) == tokenizer.vocab_size
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(theirs, f"{role}_token_id") == getattr(tokenizer, f"{role}_id"), role
    assert theirs.chat_template == tokenizer.chat_template
    assert tokenizer.special_tokens.keys() <= set(theirs.all_special_tokens) | {
        token.content for token in theirs.added_tokens_decoder.values() if token.special
    }
