"""Bounds the time that the regular expressions of a hostile `tokenizer.json` take.

Oniguruma, the tokenizers library's matcher, gives up one attempt after ten million steps, but each character
of a text begins another. Expressions of well-known tokenizers need no watching; with others a text is encoded
in a thread with a deadline.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import tokenizers

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.pre_tokenizers import PRE_TOKENIZERS

DEADLINE = 10.0  # seconds for a text, and
SECONDS_PER_CHARACTER = 1e-4  # for each of its characters: a hundred times what encoding one takes
_REPETITION = re.compile(r"[*+?{]")


def needs_deadline(*parts: Any) -> bool:
    """Whether a normalizer or pre-tokenizer of a `tokenizer.json` has an expression that may take long.

    One that matches a fixed text, or that a pre-tokenizer of pre_tokenizers.py has, does not.
    """
    return any(
        _REPETITION.search(pattern) and pattern not in _well_known()
        for part in parts
        for pattern in _expressions(part)
    )


def encode_before_deadline(origin: str, backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Encodes one text without special tokens, in a thread: `encode_batch` releases the interpreter lock.

    Args:
      origin: the file, for messages.
      backend: the encoder.
      text: the text.

    Raises:
      TokenizerError: if it takes longer than 10 s and 0.1 ms per character; the thread ends with the match.
      BaseException: what the tokenizers library raises.
    """
    result: list[list[int] | BaseException] = []

    def encode() -> None:
        try:
            result.append(backend.encode_batch([text], add_special_tokens=False)[0].ids)
        except BaseException as error:  # a Rust panic, too
            result.append(error)

    thread = threading.Thread(target=encode, daemon=True)
    thread.start()
    seconds = DEADLINE + SECONDS_PER_CHARACTER * len(text)
    thread.join(seconds)
    if not result:
        raise TokenizerError(
            f"{origin}: its regular expressions took more than {seconds:.0f} s for a text of {len(text)} "
            f"characters ({text[:40]!r}); take the tokenizer from a source that you trust"
        )
    if isinstance(found := result[0], BaseException):
        raise found
    return found


def _expressions(part: Any) -> Iterator[str]:
    pending = [part]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if isinstance(pattern := value.get("Regex"), str):
                yield pattern
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


@functools.cache
def _well_known() -> frozenset[str]:
    states = [json.loads(entry.build().__getstate__()) for entry in set(PRE_TOKENIZERS.values())]
    return frozenset(_expressions(states))
