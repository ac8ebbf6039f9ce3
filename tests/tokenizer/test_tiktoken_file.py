"""Llama 3's own tokenizer.model, beside the tokenizer.json that transformers makes of it."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path

import pytest

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import load_tokenizer
from llama_jax.tokenizer.export import export_vocabulary
from tests.tokenizer import vocabularies


def lines(pieces: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


BYTES = [bytes((byte,)) for byte in range(256)]


@pytest.fixture(scope="module")
def pieces(smollm2_path: Path) -> list[bytes]:
    """Real pieces, whose ranks are those of SmolLM2's merges, with the bytes first."""
    smollm2 = load_tokenizer(smollm2_path)
    table = [smollm2.piece(id) for id in range(17, 12_000)]
    longer = [text.encode() for text in table if not text.startswith("<0x")]
    return [*BYTES, *(piece for piece in dict.fromkeys(longer) if len(piece) > 1)]


def bpe(text: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's encoding of one word: the adjacent pair of the least rank is merged first."""
    if text in ranks:
        return [ranks[text]]
    parts = [bytes((byte,)) for byte in text]
    while True:
        pairs = [(ranks.get(a + b, 1 << 30), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        if not pairs or min(pairs)[0] == 1 << 30:
            return [ranks[part] for part in parts]
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


WORDS = [
    "Hello",
    " world",
    " unbelievable",
    "naïve",
    "\n\n",
    " 🦙",
    "don",
    "'t",
    "123",
    " transformers",
    "Привет",
]


def test_words_are_encoded_by_rank(pieces: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(lines(pieces))
    tokenizer = load_tokenizer(tmp_path)
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    assert tokenizer.vocab_size == len(pieces) + 256
    for word in WORDS:
        ids = tokenizer.encode(word, add_bos=False)
        assert ids == bpe(word.encode(), ranks), word
        assert tokenizer.decode(ids) == word
    for text in vocabularies.TEXT:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_meta_s(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(lines(BYTES))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert tokenizer.encode("hi") == [256, 104, 105]
    names = (
        "begin_of_text",
        "end_of_text",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
        "python_tag",
    )
    ids = [tokenizer.special_tokens[f"<|{name}|>"] - 256 for name in names]
    assert ids == [0, 1, 6, 7, 8, 9, 10]
    assert tokenizer.eos_ids[0] == 257
    assert set(tokenizer.eos_ids) == {257, 264, 265}
    assert len(tokenizer.special_tokens) == 256
    assert tokenizer.special_tokens["<|reserved_special_token_247|>"] == 511
    text = "<|start_header_id|>user<|end_header_id|>"
    assert tokenizer.encode(text, parse_special=True)[1] == 262
    assert 262 not in tokenizer.encode(text)


@pytest.mark.parametrize("format", ["hf", "meta", "gguf"])
def test_it_is_exported(format: str, pieces: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(lines(pieces))
    tokenizer = load_tokenizer(tmp_path)
    vocabulary = export_vocabulary(tokenizer, format)  # type: ignore[arg-type]
    if format == "gguf":
        assert vocabulary.fields["tokenizer.ggml.pre"] == "llama-bpe"
        return
    (tmp_path / "out").mkdir()
    for name, data in vocabulary.files.items():
        (tmp_path / "out" / name).write_bytes(data)
    written = load_tokenizer(tmp_path / "out")
    for text in vocabularies.TEXT:
        assert written.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lines(BYTES) + b"!!!! 256\n", r"tokenizer\.model:257: is not a piece in base64"),
        (lines(BYTES) + b"YWI= 300\n", "its 257 pieces do not have the ranks 0 to 256"),
        (lines(BYTES[:100]), "has no piece for byte 100"),
        (lines(BYTES)[:-3], r"is not a piece in base64|do not have the ranks|no piece for byte"),
    ],
)
def test_malformed_files(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)
