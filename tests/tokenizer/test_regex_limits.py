"""Regular expressions of tokenizer.json that take long: stopped, and encoded as ever where they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import regex_limits
from llama_jax.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from llama_jax.tokenizer.regex_limits import needs_deadline
from llama_jax.tokenizer.tokenizer_json import HuggingFaceTokenizer
from tests.tokenizer import vocabularies
from tests.tokenizer.test_normalizer_limits import replace, sequence
from tests.tokenizer.test_tokenizer_json import LLAMA, changed, load

# Exponential in a run of "a", and below Oniguruma's limit of steps an attempt: half a second for this text.
SLOW, TEXT = "(?:a|aa)+c", ("a" * 24 + "b") * 200


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    "part",
    [
        {"pre_tokenizer": split(SLOW)},
        {"normalizer": replace("", Regex=SLOW)},
        {"normalizer": sequence(*[replace("x" * 9, Regex=SLOW)] * 2)},
    ],
    ids=["pre-tokenizer", "normalizer", "normalizer that lengthens"],
)
def test_a_slow_expression_is_stopped(part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(tmp_path, changed(LLAMA, **part))
    assert tokenizer.encode("a fox") == load(tmp_path, changed(LLAMA, **dict.fromkeys(part))).encode("a fox")
    monkeypatch.setattr(regex_limits, "DEADLINE", 0.01)
    monkeypatch.setattr(regex_limits, "SECONDS_PER_CHARACTER", 0.0)
    with pytest.raises(TokenizerError, match="its regular expressions took more than") as caught:
        tokenizer.encode(TEXT)
    assert "\n" not in str(caught.value) and f"a text of {len(TEXT)} characters" in str(caught.value)


def test_an_attempt_without_end_is_one_line(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, changed(LLAMA, pre_tokenizer=split("(a+)+$")))
    with pytest.raises(TokenizerError, match="cannot encode") as caught:
        tokenizer.encode("a" * 40 + "b")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [LLAMA, vocabularies.byte_level_json()])
def test_real_tokenizers_are_not_watched(content: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = load(tmp_path, content)
    assert isinstance(tokenizer, HuggingFaceTokenizer) and not tokenizer.deadline
    for entry in PRE_TOKENIZERS.values():
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = entry.build()
        saved = json.loads(backend.to_str())
        assert not needs_deadline(saved["normalizer"], saved["pre_tokenizer"])
    assert not needs_deadline(replace(" ", Regex="\u2581"), split("\\n"))
    assert needs_deadline(sequence(replace(" ", Regex="x{9}")), None)
