"""SmolLM2's vocabulary from its GGUF file: the ids equal Hugging Face's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer import corpus, make_golden

# Bytes without a piece in the published vocabulary: control characters, and bytes that do not occur in the
# UTF-8 encoding of any assigned character.
ABSENT = (0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100))


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return corpus.lines()


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(make_golden.GOLDEN.read_text())


def test_corpus_is_that_of_the_golden_file(lines: list[str], golden: dict[str, Any]) -> None:
    assert len(lines) == corpus.LINES >= 10_000
    assert make_golden.corpus_digest(lines) == golden["corpus"]


def test_ids_equal_hugging_face(
    smollm2_tokenizer: Tokenizer, lines: list[str], golden: dict[str, Any]
) -> None:
    rows = [smollm2_tokenizer.encode(line) for line in lines]
    for line, ids in golden["rows"].items():
        assert rows[int(line)] == ids, lines[int(line)]
    wrong = [
        i
        for i, pair in enumerate(zip(make_golden.blocks(rows), golden["blocks"], strict=True))
        if len({*pair}) > 1
    ]
    assert not wrong, f"blocks of {make_golden.BLOCK} lines that differ: {wrong}"


def test_round_trip_of_the_corpus(smollm2_tokenizer: Tokenizer, lines: list[str]) -> None:
    whole = [line for line in lines if not set(line.encode()) & set(ABSENT)]
    assert len(whole) > 0.99 * len(lines)
    for line in whole:
        assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(line)) == line


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_random_text(smollm2_tokenizer: Tokenizer, text: str) -> None:
    text = "".join(character for character in text if not set(character.encode()) & set(ABSENT))
    assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text)) == text


def test_bytes_without_a_piece_are_dropped_as_in_hugging_face(smollm2_tokenizer: Tokenizer) -> None:
    pieces = {smollm2_tokenizer.piece(i) for i in range(smollm2_tokenizer.vocab_size)}
    spelled = {byte: chr(byte) if byte < 0x80 else f"<0x{byte:02X}>" for byte in range(256)}
    assert tuple(byte for byte in range(256) if spelled[byte] not in pieces) == ABSENT
    assert smollm2_tokenizer.encode("a\x04b\0c") == [81, 82, 190, 83]


def test_special_ids(smollm2_tokenizer: Tokenizer) -> None:
    assert smollm2_tokenizer.vocab_size == 49_152
    assert (smollm2_tokenizer.bos_id, smollm2_tokenizer.eos_id) == (1, 2)
    assert (smollm2_tokenizer.unk_id, smollm2_tokenizer.pad_id) == (0, 2)
    assert smollm2_tokenizer.eos_ids == (2, 0)
    assert not smollm2_tokenizer.add_bos
    assert len(smollm2_tokenizer.special_tokens) == 17
    assert smollm2_tokenizer.chat_template is not None
    assert "<|im_start|>" in smollm2_tokenizer.chat_template


def test_control_tokens(smollm2_tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nHello, world! 2024\n<|im_end|>"
    parsed = [1, 4093, 198, 19556, 28, 905, 17, 216, 34, 32, 34, 36, 198, 2]  # the published tokenizer's
    assert smollm2_tokenizer.encode(text, parse_special=True) == parsed
    assert smollm2_tokenizer.decode(parsed) == "user\nHello, world! 2024\n"
    assert smollm2_tokenizer.decode(parsed, skip_special_tokens=False) == text
    plain = smollm2_tokenizer.encode(text)
    assert not {*plain} & {*smollm2_tokenizer.special_tokens.values()}
    assert smollm2_tokenizer.decode(plain) == text
