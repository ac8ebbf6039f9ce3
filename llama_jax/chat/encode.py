"""Encodes a conversation as token ids, safe against control tokens injected by messages.

The rendered template is encoded as in Hugging Face's transformers, with one more rule: a control token, or
another turn marker such as Llama 2's `[INST]`, is recognized only where all of it was written by the
template. In the content of a message it is ordinary text.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterator, Mapping, Sequence

from llama_jax.chat.process import RENDERER
from llama_jax.chat.templates import ChatTemplate
from llama_jax.errors import InputError
from llama_jax.tokenizer import Tokenizer

Messages = Sequence[Mapping[str, str]]

ROLES = ("system", "user", "assistant")

# Turn markers that are not control tokens in some vocabularies.
_TURN_MARKER = re.compile(r"\[/?INST\]|<</?SYS>>|<\|[^\s<>|]{1,40}\|>")


def validate_messages(messages: Messages) -> list[dict[str, str]]:
    """Validates a conversation and returns a copy of its messages.

    The content may be any text, including NUL and other control characters.

    Raises:
      InputError: if there are no messages; or naming the first message whose keys are not role and content,
        whose role is not system, user or assistant, or whose content is not a str or has a lone surrogate.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise InputError("there are no messages; give a list of {'role': 'user', 'content': '...'}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            found = list(message) if isinstance(message, Mapping) else type(message).__name__
            raise InputError(
                f"messages[{i}] is {str(found)[:60]}; it must have a role and a content, and nothing else"
            )
        role, content = message["role"], message["content"]
        if role not in ROLES:
            raise InputError(f"messages[{i}]: role is {str(role)[:40]!r}; it must be {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"messages[{i}]: content is of type {type(content).__name__}; it must be a str")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"messages[{i}]: content has a lone surrogate, {content[error.start]!r}, at character "
                f"{error.start}; replace it, for example with content.encode('utf-8', 'replace').decode()"
            ) from None
        checked.append({"role": role, "content": content})
    return checked


def render_chat(template: ChatTemplate, messages: Messages, add_generation_prompt: bool = True) -> str:
    """Renders a conversation with a template as one text; see `encode_chat`."""
    return _render(template, validate_messages(messages), add_generation_prompt)


def _render(template: ChatTemplate, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    return RENDERER.render(
        template.name,
        template.source,
        {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **template.tokens,
        },
    )


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Messages, add_generation_prompt: bool = True
) -> list[int]:
    """Encodes a conversation as the token ids of a prompt.

    The ids equal those of Hugging Face's `apply_chat_template`: control tokens written by the template
    become their ids, and BOS is present if and only if the template writes it, regardless of
    `tokenizer.add_bos`; a doubled BOS at the start is collapsed to one.

    In the content of a message, the vocabulary's control tokens and the template's own markers of the forms
    `[INST]`, `<<SYS>>` and `<|...|>` are ordinary text: their ids differ from those of the template's
    markers, and decode to the same characters.

    Args:
      tokenizer: the tokenizer.
      template: from `chat_template`.
      messages: each with a role (system, user or assistant) and a content.
      add_generation_prompt: whether to append the header of the assistant's answer.

    Returns:
      The ids, a list of int.

    Raises:
      InputError: for malformed messages (see `validate_messages`), or messages that the template refuses.
      TokenizerError: for a template that does not render, or exceeds the limits on time or memory.
    """
    messages = validate_messages(messages)
    markers = filter(None, (*tokenizer.special_tokens, *_TURN_MARKER.findall(template.source)))
    matcher = _marker_matcher(frozenset(markers))
    sentinel = _unused_character([template.source, *(message["content"] for message in messages)])
    guarded = [
        {**m, "content": matcher.insert_sentinels(m["content"], sentinel, tokenizer)} for m in messages
    ]
    first, *rest = matcher.split(_render(template, guarded, add_generation_prompt), sentinel)
    ids = tokenizer.encode(first, add_bos=False, parse_special=True)
    sentinel_ids = tokenizer.encode(sentinel, add_bos=False) if rest else []
    for part in rest:
        ids += _encode_continuation(tokenizer, part, sentinel, sentinel_ids)
    while tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        del ids[0]
    if not ids:
        raise InputError(f"{template.name} renders these messages as an empty text; give another template")
    return ids


class _MarkerMatcher:
    """Finds the markers in a rendered text that were written, all or in part, by a message.

    Before rendering, a sentinel, a character that occurs nowhere else, is inserted into every marker in a
    message, and at either end of a message that could complete a marker there. A rendered marker with a
    sentinel inside came at least in part from a message: the text is split there, and the parts are encoded
    separately. All other sentinels are removed.
    """

    def __init__(self, markers: frozenset[str]):
        longest_first = sorted(map(re.escape, markers), key=len, reverse=True)
        # A lookahead has empty matches, so that markers may overlap; that for the first characters is only
        # for speed, since there may be hundreds of markers. A template may change the case of a message.
        first = "".join(sorted({re.escape(marker[0]) for marker in markers})) or "\0"
        pattern = f"(?=[{first}])(?=({'|'.join(longest_first) or '(?!)'}))"
        self._exact, self._ignore_case = re.compile(pattern), re.compile(pattern, re.IGNORECASE)
        self._markers = markers
        self._prefixes = {marker[:n] for marker in markers for n in range(1, len(marker))}
        self._suffixes = {marker[n:] for marker in markers for n in range(1, len(marker))}
        self._max_length = max(map(len, markers), default=0)

    def insert_sentinels(self, content: str, sentinel: str, tokenizer: Tokenizer) -> str:
        """Returns `content` with sentinels in its markers, and at ends that could complete a marker."""
        split_points = functools.cache(functools.partial(self._split_points, tokenizer))
        positions = {m.start() + n for m in self._ignore_case.finditer(content) for n in split_points(m[1])}
        # The ends after stripping, because a template may strip the content.
        start, end = len(content) - len(content.lstrip()), len(content.rstrip())
        lengths = range(1, min(self._max_length, end - start + 1))
        if any(content[start : start + n] in self._suffixes for n in lengths):
            positions.add(start)
        if any(content[end - n : end] in self._prefixes for n in lengths):
            positions.add(end)
        return sentinel.join(_split_at(content, sorted(positions)))

    def split(self, rendered: str, sentinel: str) -> list[str]:
        """Returns the parts of a rendered text to encode separately, without sentinels."""
        sentinels, offset = [], 0
        for part in rendered.split(sentinel)[:-1]:
            offset += len(part)
            sentinels.append(offset)
        text = rendered.replace(sentinel, "")
        if not sentinels:
            return [text]
        positions: set[int] = set()
        for m in self._exact.finditer(text):
            first, end = bisect.bisect_right(sentinels, m.start()), m.start() + len(m[1])
            positions.update(sentinels[first : bisect.bisect_left(sentinels, end)])
        return _split_at(text, sorted(positions))

    def _split_points(self, tokenizer: Tokenizer, match: str) -> list[int]:
        """Returns where to split a matched marker, in any case, and the shorter markers it begins with."""
        prefixes = [marker for marker in self._markers if match.lower().startswith(marker.lower())]
        return [_split_point(tokenizer, match[: len(marker)]) for marker in prefixes]


@functools.lru_cache(maxsize=8)
def _marker_matcher(markers: frozenset[str]) -> _MarkerMatcher:
    return _MarkerMatcher(markers)


def _split_at(text: str, positions: Sequence[int]) -> list[str]:
    return [text[start:end] for start, end in zip((0, *positions), (*positions, len(text)), strict=True)]


def _split_point(tokenizer: Tokenizer, marker: str) -> int:
    """Returns where to split a marker so that its parts have other ids: in the middle of its longest piece.

    Raises:
      InputError: for a marker of one character.
    """
    if len(marker) == 1:
        raise InputError(
            f"a message contains {marker!r}, which is a control token of this vocabulary; remove it"
        )
    stream = tokenizer.stream(skip_special_tokens=False)
    lengths = [len(stream.push(token)) for token in tokenizer.encode(marker, add_bos=False)]
    longest = lengths.index(max(lengths))
    return min(sum(lengths[:longest]) + (lengths[longest] + 1) // 2, len(marker) - 1) or 1


def _encode_continuation(
    tokenizer: Tokenizer, text: str, sentinel: str, sentinel_ids: list[int]
) -> list[int]:
    """Encodes text that continues another text, without SentencePiece's prefix space.

    The prefix space goes before the sentinel, whose ids are dropped: no piece merges with the sentinel.
    """
    ids = tokenizer.encode(sentinel + text, add_bos=False, parse_special=True)
    if ids[: len(sentinel_ids)] == sentinel_ids:
        return ids[len(sentinel_ids) :]
    return tokenizer.encode(text, add_bos=False, parse_special=True)  # byte pieces may merge with its bytes


def _unused_character(texts: Sequence[str]) -> str:
    """Returns a private-use character that occurs in none of the texts.

    Raises:
      InputError: if they hold all of them.
    """
    used = set().union(*texts)
    for character in _private_use():
        if character not in used:
            return character
    raise InputError("the messages and their template hold every private-use character; leave some out")


def _private_use() -> Iterator[str]:
    for first, last in ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)):
        yield from map(chr, range(first, last + 1))
