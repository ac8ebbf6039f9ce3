"""Tokenizers against Hugging Face's, live, and against byte-pair encoding written out by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from tests.tokenizer import corpus, make_golden

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
regex = pytest.importorskip("regex", reason="needs the `parity` extra")
gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return corpus.lines()


@pytest.fixture(scope="module")
def ours(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


@pytest.fixture(scope="module")
def theirs(smollm2_path: Path) -> Any:
    return make_golden.hugging_face(smollm2_path)


def test_smollm2_encodes_and_decodes_as_hugging_face_does(
    ours: Tokenizer, theirs: Any, lines: list[str]
) -> None:
    rows = theirs(lines, add_special_tokens=False)["input_ids"]
    for line, ids in zip(lines, rows, strict=True):
        assert ours.encode(line) == ids, line
        assert ours.decode(ids) == theirs.decode(ids), line


def test_smollm2s_control_tokens_are_hugging_faces(ours: Tokenizer, theirs: Any, lines: list[str]) -> None:
    names = list(ours.special_tokens)
    for i, line in enumerate(lines[:2000]):
        text = f"{names[i % 17]}{line}{names[i * 7 % 17]} {line}"
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, parse_special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


class ByHand:
    """Byte-level BPE by its definition, sharing no code with the tokenizers library."""

    def __init__(self, path: Path):
        fields = gguf.GGUFReader(path).fields
        self.ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        printable = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
        others = [b for b in range(256) if b not in printable]
        self.spelling = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
        self.words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        words = [word for digits in cut(r"\p{N}", text) for word in cut(GPT2, digits)]
        return [token for word in words for token in self.word(word)]

    def word(self, word: str) -> list[int]:
        if word not in self.words:
            parts = [self.spelling[byte] for byte in word.encode()]
            parts = [part for part in parts if part in self.ids]
            while len(parts) > 1:
                ranks = [self.ranks.get(pair, len(self.ranks)) for pair in itertools.pairwise(parts)]
                best = min(range(len(ranks)), key=ranks.__getitem__)
                if ranks[best] == len(self.ranks):
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            self.words[word] = [self.ids[part] for part in parts]
        return self.words[word]


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Patterns applied in turn, each to the pieces that the one before left: the published ones.
PATTERNS = {
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (LLAMA3,),
    "qwen2": (LLAMA3.replace("{1,3}", ""),),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}


def cut(pattern: str, text: str) -> list[str]:
    """Splits `text` into matches of `pattern` and what lies between them."""
    pieces, at = [], 0
    for match in regex.finditer(pattern, text):
        pieces += [text[at : match.start()], match[0]]
        at = match.end()
    return [piece for piece in (*pieces, text[at:]) if piece]


def test_smollm2_is_byte_pair_encoding_by_hand(ours: Tokenizer, smollm2_path: Path, lines: list[str]) -> None:
    by_hand = ByHand(smollm2_path)
    for line in lines:
        assert ours.encode(line) == by_hand.encode(line), line


@pytest.mark.parametrize("name", PATTERNS)
def test_pre_tokenizers_cut_as_published(name: str, lines: list[str]) -> None:
    pre = PRE_TOKENIZERS[name].build()
    for line in lines:
        pieces = [line]
        for pattern in PATTERNS[name]:
            pieces = [part for piece in pieces for part in cut(pattern, piece)]
        ends = [end for _, (_, end) in pre.pre_tokenize_str(line)]
        assert ends == [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))], line
