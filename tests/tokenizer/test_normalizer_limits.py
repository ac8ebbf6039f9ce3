"""Normalizers of tokenizer.json that lengthen a text: bounded where they could fill memory."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import Tokenizer
from llama_jax.tokenizer.normalizer_limits import growth_check
from llama_jax.tokenizer.tokenizer_json import HuggingFaceTokenizer
from tests.tokenizer import vocabularies
from tests.tokenizer.test_tokenizer_json import LLAMA, changed, load


def replace(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def compiled(rule: bytes) -> dict[str, Any]:
    """SentencePiece's rules with an empty trie."""
    data = (4).to_bytes(4, "little") + bytes(4) + rule + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


BOMBS = {
    "a megabyte": (replace("l" * (1 << 20), String="l"), "l" * 3000),
    "doubled": (sequence(*[replace("ll", String="l")] * 34), "Hello"),
    "nested": (sequence(*[sequence(sequence(replace("ll", String="l")))] * 34), "Hello"),
    "any character": (sequence(*[replace("xyz", Regex=".")] * 20), "Hello"),
    "no character": (replace("x" * 5000, Regex="(?=l)"), "Hello" * 20),
    "before": (sequence(*[{"type": "Prepend", "prepend": "x" * 5000}] * 2), "Hello"),
}


def load_with(tmp_path: Path, normalizer: Any) -> Tokenizer:
    return load(tmp_path, changed(LLAMA, normalizer=normalizer))


@pytest.mark.parametrize("name", BOMBS)
def test_a_text_that_would_fill_memory_is_one_line(name, tmp_path):
    normalizer, text = BOMBS[name]
    with pytest.raises(TokenizerError) as caught:
        load_with(tmp_path, normalizer).encode(text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'tokenizer.json'}: its normalizer makes a text of ")
    assert "more than 64 times as long" in message and len(message) < 300


def test_a_bomb_for_the_text_that_loading_tries(tmp_path):
    with pytest.raises(TokenizerError, match="more than 64 times as long"):
        load_with(tmp_path, sequence(*[replace("aa", String="a")] * 34))


def test_too_many_steps(tmp_path):
    with pytest.raises(TokenizerError, match="its normalizer has 1001 steps; at most 1000 are run"):
        load_with(tmp_path, sequence(*[{"type": "Lowercase"}] * 1001))


def test_rules_that_lengthen_too_much():
    assert growth_check("file", sequence(compiled(b"x" * 18), replace("\u2581", Regex=" {2,}"))) is None
    check = growth_check("file", compiled(b"x" * 1000))
    assert check is not None
    with pytest.raises(TokenizerError, match="more than 64 times as long"):
        check("a text of some length" * 10)


def test_texts_that_do_not_grow_have_the_ids_of_the_library(tmp_path):
    """A long replacement that is rarely needed: only the texts that it would fill memory with are refused."""
    tokenizer = load_with(
        tmp_path, sequence(replace("a fox " * 20, String="@"), *LLAMA["normalizer"]["normalizers"])
    )
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.check_text is not None
    for text in ("a fox", "a fox @ jumps"):
        whole = load(tmp_path, LLAMA).encode(text.replace("@", "a fox " * 20))
        assert tokenizer.encode(text) == whole


@pytest.mark.parametrize("content", [LLAMA, vocabularies.byte_level_json()])
def test_real_normalizers_are_not_checked(content, tmp_path):
    tokenizer = load(tmp_path, content)
    assert isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.check_text is None
    # Of models in use: XLNet's and ALBERT's replacements, BERT's normalizer, Unicode's forms.
    steps = [replace('"', String="``"), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]
    steps += [replace(" ", Regex=" {2,}"), {"type": "BertNormalizer"}, {"type": "NFKC"}]
    assert growth_check("file", sequence(*steps)) is None
