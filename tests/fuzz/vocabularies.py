"""Fuzzing targets of tokenizers: a valid vocabulary in which the fuzzer's bytes replace one file."""

from __future__ import annotations

import base64
import functools
from pathlib import Path

from llama_jax.tokenizer import load_tokenizer
from tests.tokenizer import vocabularies

TEXT = "the cat  sat on\n 12 é <s>hello world</s>"


def read(path: Path) -> None:
    """Loads the tokenizer, encodes and decodes."""
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT, parse_special=True)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    tokenizer.decode(ids)
    stream = tokenizer.stream()
    stream.extend(ids)
    stream.flush()


def write_pieces(path: Path) -> None:
    """A SentencePiece model with words added beside it."""
    path.mkdir()
    (path / "tokenizer.model").write_bytes(vocabularies.sentencepiece_model())
    vocabularies.write_json(path / "added_tokens.json", {"<|im_start|>": 340, "hello world": 341})


def write_json(path: Path, *, byte_level: bool) -> None:
    """`tokenizer.json` with its two neighbours."""
    path.mkdir()
    content = (
        vocabularies.byte_level_json()
        if byte_level
        else vocabularies.llama_json(vocabularies.sentencepiece_model())
    )
    vocabularies.write_json(path / "tokenizer.json", content)
    fields = {"eos_token": content["added_tokens"][-1]["content"], "chat_template": vocabularies.TEMPLATE}
    vocabularies.write_json(path / "tokenizer_config.json", fields)
    vocabularies.write_json(path / "generation_config.json", {"eos_token_id": [2, 3]})


def write_tiktoken(path: Path) -> None:
    """Llama 3's own format: a base64 piece and its rank a line."""
    path.mkdir()
    pieces = [bytes((byte,)) for byte in range(256)] + [b"th", b"the", b" the", b"at", b" c", b" cat"]
    lines = (base64.b64encode(piece).decode() + f" {rank}" for rank, piece in enumerate(pieces))
    (path / "tokenizer.model").write_text("\n".join(lines) + "\n")


def write_gguf(path: Path, *, byte_level: bool) -> None:
    """GGUF's metadata."""
    fields = (
        vocabularies.bpe_fields(vocabularies.byte_level_json())
        if byte_level
        else vocabularies.spm_fields(vocabularies.sentencepiece_model())
    )
    vocabularies.write_gguf(path, fields, vocabularies.TEMPLATE)


WRITERS = {
    "tokenizer-model": (write_pieces, "tokenizer.model"),
    "tokenizer-added": (write_pieces, "added_tokens.json"),
    "tokenizer-json": (functools.partial(write_json, byte_level=False), "tokenizer.json"),
    "tokenizer-json-bytes": (functools.partial(write_json, byte_level=True), "tokenizer.json"),
    "tokenizer-config": (functools.partial(write_json, byte_level=True), "tokenizer_config.json"),
    "tokenizer-ends": (functools.partial(write_json, byte_level=True), "generation_config.json"),
    "tokenizer-tiktoken": (write_tiktoken, "tokenizer.model"),
    "tokenizer-gguf": (functools.partial(write_gguf, byte_level=False), ""),
    "tokenizer-gguf-bytes": (functools.partial(write_gguf, byte_level=True), ""),
}
