"""GPT-2's byte-level alphabet, and the pre-tokenizers of byte-level BPE vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers


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


class PreTokenizer(NamedTuple):
    """The pre-tokenization of a byte-level BPE vocabulary.

    Attributes:
      build: builds the pre-tokenizer, whose last step is `ByteLevel`.
      normalizer: builds the normalizer, applied first; or None.
      ignore_merges: whether a word that is a piece becomes that piece regardless of the merges.
      add_bos: whether vocabularies of this kind prepend BOS by default.
    """

    build: Callable[[], pre_tokenizers.PreTokenizer]
    normalizer: Callable[[], normalizers.Normalizer] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(*patterns: str) -> Callable[[], pre_tokenizers.PreTokenizer]:
    def build() -> pre_tokenizers.PreTokenizer:
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
        return pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    return build


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_LLAMA3 = PreTokenizer(
    _split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), ignore_merges=True, add_bos=True
)
_SINGLE_DIGITS = PreTokenizer(_single_digits)

# By the value of `tokenizer.ggml.pre`. The names are llama.cpp's (src/llama-vocab.cpp); each entry is the
# pre-tokenizer in the tokenizer.json of the models that the name stands for. `default`, for files without
# the key, is llama.cpp's own.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer(_split(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer(_gpt2),
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": PreTokenizer(_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), normalizer=normalizers.NFC),
}


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
