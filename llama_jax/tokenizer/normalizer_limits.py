"""Keeps the normalizer of a hostile `tokenizer.json` from filling memory.

A few replacements that lengthen a text make gigabytes of it: 34 times "l" by "ll", or once by a megabyte.
Those of real tokenizers cannot, which their definitions show; for all others each text is checked first.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tokenizers

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.regex_limits import encode_before_deadline, needs_deadline

# Characters per character. Unicode's compatibility forms have at most 18, also in SentencePiece's rules.
MAX_GROWTH = 64
MAX_STEPS = 1000  # normalizers in a sequence; real ones have ten
_MARK = "\U0010fffe"  # a noncharacter, to count matches by
_EMPTY_MODEL = {"type": "BPE", "vocab": {}, "merges": []}


def growth_check(origin: str, normalizer: Any) -> Callable[[str], None] | None:
    """Makes the function that checks a text before it is encoded; None if no text needs it.

    Args:
      origin: the file, for messages.
      normalizer: the `normalizer` of a `tokenizer.json` that the tokenizers library has read.

    Returns:
      A function that raises a TokenizerError for a text that the normalizer makes more than 64 times as long.

    Raises:
      TokenizerError: if there are more than 1000 steps.
    """
    steps = list(_steps(normalizer))
    if len(steps) > MAX_STEPS:
        raise TokenizerError(f"{origin}: its normalizer has {len(steps)} steps; at most {MAX_STEPS} are run")
    bound = 1.0
    for step in steps:
        bound *= _growth(step)
    if bound <= MAX_GROWTH:
        return None

    def check(text: str) -> None:
        limit = MAX_GROWTH * max(len(text), 64)
        for step in steps:
            if needs_deadline(step):  # `normalize_str` could not be stopped
                encode_before_deadline(origin, _tokenizer({**step, "content": _MARK}), text)
            if len(text) * _growth(step) > limit and _length_after(step, text) > limit:
                raise TokenizerError(
                    f"{origin}: its normalizer makes a text of {limit // MAX_GROWTH} characters more than "
                    f"{MAX_GROWTH} times as long; take the tokenizer from a source that you trust"
                )
            text = _apply(step, text)

    return check


def _steps(normalizer: Any) -> Iterator[Mapping[str, Any]]:
    """The normalizers of nested sequences, in order."""
    pending = [normalizer]
    while pending:
        step = pending.pop()
        if isinstance(step, dict) and step.get("type") == "Sequence":
            pending.extend(reversed(step.get("normalizers") or []))
        elif isinstance(step, dict):
            yield step


def _growth(step: Mapping[str, Any]) -> float:
    """A bound on the characters that a step makes of one, on average of any text; 1 for Unicode's own forms.

    Those lengthen each character once however often they are applied, and by 18 at most.
    """
    match step.get("type"):
        case "Replace":
            content, pattern = str(step.get("content", "")), step.get("pattern")
            text = pattern.get("String") if isinstance(pattern, dict) else None
            if isinstance(text, str) and text:
                return max(1.0, len(content) / len(text))
            return 1.0 + len(content)  # a regular expression may match nothing, before every character
        case "Prepend":
            added = len(str(step.get("prepend", "")))
            return 1.0 if added <= MAX_GROWTH else 1.0 + added
        case "Precompiled":
            return float(max(1, _longest_rule(str(step.get("precompiled_charsmap", "")))))
    return 1.0


def _longest_rule(charsmap: str) -> int:
    """Characters of the longest text that SentencePiece's compiled rules replace a match by.

    They are a trie, after its size as 4 bytes, and then those texts, each ended by NUL.
    """
    try:
        data = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 1
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return max(map(len, texts.decode(errors="replace").split("\0")))


def _length_after(step: Mapping[str, Any], text: str) -> int:
    """The length of a text after a step, or a bound on it; replacements are counted, not made."""
    if step["type"] == "Prepend":
        return len(text) + len(step["prepend"])
    if step["type"] != "Replace":
        return int(len(text) * _growth(step))
    marked = _apply({**step, "content": _MARK}, text)
    count = marked.count(_MARK) - text.count(_MARK)
    return len(marked) + count * (len(step["content"]) - 1)


def _apply(step: Mapping[str, Any], text: str) -> str:
    normalizer = _tokenizer(step).normalizer
    return text if normalizer is None else normalizer.normalize_str(text)


def _tokenizer(step: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer of this normalizer, without a vocabulary."""
    whole = {"version": "1.0", "added_tokens": [], "normalizer": step, "model": _EMPTY_MODEL}
    return tokenizers.Tokenizer.from_str(json.dumps(whole))
