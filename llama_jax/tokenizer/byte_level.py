"""GPT-2's byte-level alphabet, and what a byte-level BPE tokenizer does before it merges."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer, models

from llama_jax.tokenizer.pre_tokenizers import PRE_TOKENIZERS


def _alphabet() -> dict[str, int]:
    """Maps the 256 printable characters that represent bytes to their bytes.

    Printable Latin-1 characters represent themselves; the other bytes are the code points from 256 on, in
    order (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF: Mapping[str, int] = _alphabet()


def piece_bytes(piece: str) -> bytes:
    """Returns the bytes of a byte-level piece; a piece outside the alphabet is encoded as UTF-8."""
    try:
        return bytes(map(BYTE_OF.__getitem__, piece))
    except KeyError:
        return piece.encode()


def is_byte_level(backend: Tokenizer) -> bool:
    """Whether the pieces are in GPT-2's byte-level alphabet."""
    parts = json.loads(backend.to_str())
    return any(step["type"] == "ByteLevel" for step in pipeline_steps(parts["decoder"]))


def match_pre_tokenizer(backend: Tokenizer) -> str | None:
    """Returns the name in `PRE_TOKENIZERS` that a byte-level BPE tokenizer is equivalent to, or None."""
    settings = _encoding_settings(backend)
    for name, pre in PRE_TOKENIZERS.items():
        known = Tokenizer(models.BPE(ignore_merges=pre.ignore_merges))
        known.pre_tokenizer = pre.build()
        if pre.normalizer:
            known.normalizer = pre.normalizer()
        if _encoding_settings(known) == settings:
            return name
    return None


def _encoding_settings(backend: Tokenizer) -> Any:
    """Returns all settings that affect encoding, except the vocabulary and the merges."""
    parts = json.loads(backend.to_str())
    model = parts["model"]
    model_settings = [
        model.get(name) or None
        for name in (
            *("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"),
            "ignore_merges",
        )
    ]
    steps = [list(pipeline_steps(parts[name])) for name in ("normalizer", "pre_tokenizer")]
    return steps, model_settings


def pipeline_steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yields the steps of a normalizer, pre-tokenizer or decoder in a tokenizer.json, flattened.

    Omits `trim_offsets`, which affects only the offsets.
    """
    if part is None:
        return
    if part["type"] == "Sequence":
        kinds = ("normalizers", "pretokenizers", "decoders")
        for step in next(part[kind] for kind in kinds if kind in part):
            yield from pipeline_steps(step)
    else:
        yield {key: value for key, value in part.items() if key != "trim_offsets"}
