"""What training texts spell like control tokens, and what becomes of it: counted, to be said once."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence

from llama_jax.tokenizer.base import END_TOKENS

from .conversations import Conversation
from .encode import Encoder
from .examples import ExampleSource
from .parts import Part
from .source import TextSource

_SHOWN = 4  # names in one note
_MAX_CHARACTERS = 1 << 21  # of text to read; documents may be long


def control_token_notes(parts: Sequence[Part], encode: Encoder, sample: int) -> list[str]:
    """Returns notes on the control tokens, of this vocabulary or others, that the first records spell.

    Args:
      parts: the sources.
      encode: the tokenizer's encoder.
      sample: number of records to read of all sources together.
    """
    special = encode.tokenizer.special_tokens
    names = sorted(filter(None, {*special, *END_TOKENS}), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)))
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    read = 0
    for part in parts:
        characters = 0
        for index in part.train_index[: sample // len(parts) + 1]:
            if characters > _MAX_CHARACTERS // len(parts):
                break
            read += 1
            for text, is_message in _texts(part, index):
                characters += len(text)
                for name in pattern.findall(text):
                    counts[_meaning(name in special, is_message, encode.parse_special)][name] += 1
    notes = []
    for meaning, found in counts.items():
        shown = ", ".join(f"{name} {count} times" for name, count in found.most_common(_SHOWN))
        more = ", ..." if len(found) > _SHOWN else ""
        notes.append(f"the first {read} records spell {shown}{more}: {meaning}")
    return notes


def _meaning(known: bool, is_message: bool, parse_special: bool) -> str:
    if not known:
        return "no control tokens of this vocabulary, so they are learned as ordinary text"
    if is_message:
        return "in messages they are ordinary text"
    if parse_special:
        return "they become control tokens; data.parse_special = false makes them ordinary text"
    return "they are ordinary text; data.parse_special = true makes them control tokens"


def _texts(part: Part, index: int) -> Iterator[tuple[str, bool]]:
    """Yields the texts of one record, and whether each is a message; none of a folder of token ids."""
    if isinstance(part.source, TextSource):
        yield from ((text, False) for text in part.source.texts(index))
    elif isinstance(part.source, ExampleSource):
        for side in part.source.sides(index):
            yield from ((text, isinstance(side, Conversation)) for text in side.texts())
