"""Live comparison with transformers: the tokenizer files that we write encode there as they do here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_jax.tokenizer import Tokenizer
from llama_jax.tokenizer.export import export_vocabulary
from tests.tokenizer import corpus

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")


@pytest.fixture
def theirs(tokenizer: Tokenizer, tmp_path: Path) -> Any:
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, data in export_vocabulary(tokenizer, "hf").files.items():
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
