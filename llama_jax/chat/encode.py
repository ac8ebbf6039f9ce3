"""Encodes a conversation as token ids, safe against control tokens injected by messages.

The rendered template is encoded as in Hugging Face's transformers, with one more rule: a control token, or
another turn marker such as Llama 2's `[INST]`, is recognized only where all of it was written by the
template. In a message, a tool or another variable it is ordinary text.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.chat.messages import (
    ROLES,
    Messages,
    content_text,
    map_said,
    map_texts,
    part_text,
    texts,
    validate_messages,
    validate_variables,
)
from llama_jax.chat.process import RENDERER
from llama_jax.chat.templates import ChatTemplate
from llama_jax.errors import InputError, LlamaJaxError
from llama_jax.tokenizer import Tokenizer

# Turn markers that are not control tokens in some vocabularies.
_TURN_MARKER = re.compile(r"\[/?INST\]|<</?SYS>>|<\|[^\s<>|]{1,40}\|>")


def render_chat(
    template: ChatTemplate, messages: Messages, add_generation_prompt: bool = True, **variables: Any
) -> str:
    """Renders a conversation with a template as one text; see `encode_chat`."""
    return _render(
        template, validate_messages(messages), validate_variables(variables), add_generation_prompt
    )


def _render(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    variables: Mapping[str, Any],
    add_generation_prompt: bool,
) -> str:
    """Renders a template; it gets contents in parts as they are, or as one text if it reads only texts."""

    def render(messages: list[dict[str, Any]]) -> str:
        inputs = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return RENDERER.render(template.name, template.source, {**template.tokens, **variables, **inputs})

    messages = [{name: value for name, value in m.items() if name != "weight"} for m in messages]
    in_parts = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    if in_parts:
        try:
            rendered = render(messages)
        except LlamaJaxError:
            rendered = ""
        written = all(part_text(part).strip() in rendered for content in in_parts for part in content)
        if written and not any(str(content) in rendered for content in in_parts):  # no Python lists
            return rendered
        messages = [{**m, "content": content_text(m)} if "content" in m else m for m in messages]
    return render(messages)


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Messages,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[int]:
    """Encodes a conversation as the token ids of a prompt.

    The ids equal those of Hugging Face's `apply_chat_template`: control tokens written by the template
    become their ids, and BOS is present if and only if the template writes it, regardless of
    `tokenizer.add_bos`; a doubled BOS at the start is collapsed to one. Unlike there, contents in parts are
    joined for a template that reads only texts.

    In messages and variables, the vocabulary's control tokens and the template's own markers of the forms
    `[INST]`, `<<SYS>>` and `<|...|>` are ordinary text: their ids differ from those of the template's
    markers, and decode to the same characters. This holds for a template that changes a message too, or the
    message is refused.

    Args:
      tokenizer: the tokenizer.
      template: from `chat_template`.
      messages: each with a role and a content, or tool calls; see `validate_messages`.
      add_generation_prompt: whether to append the header of the assistant's answer.
      **variables: the template's other variables: `tools`, a list of JSON schemas or its JSON text;
        `documents`; and what this template knows, such as `enable_thinking`.

    Returns:
      The ids, a list of int.

    Raises:
      InputError: for malformed messages or tools, or messages that the template refuses.
      TokenizerError: for a template that does not render, or exceeds the limits on time or memory.
    """
    checked, variables = validate_messages(messages), validate_variables(variables)
    _check_calls(template, checked)
    markers = filter(None, (*tokenizer.special_tokens, *_TURN_MARKER.findall(template.source)))
    matcher = _marker_matcher(frozenset(markers))
    sentinel = _unused_character([template.source, *texts([checked, variables])])
    rendered = _render_marked(
        template, checked, variables, add_generation_prompt, matcher, sentinel, tokenizer
    )
    first, *rest = matcher.split(rendered, sentinel)
    ids = tokenizer.encode(first, add_bos=False, parse_special=True)
    sentinel_ids = tokenizer.encode(sentinel, add_bos=False) if rest else []
    for part in rest:
        ids += _encode_continuation(tokenizer, part, sentinel, sentinel_ids)
    while tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        del ids[0]
    if not ids:
        raise InputError(f"{template.name} renders these messages as an empty text; give another template")
    return ids


def _check_calls(template: ChatTemplate, messages: list[dict[str, Any]]) -> None:
    """Raises InputError for a message that is nothing but tool calls, which the template would leave out."""
    for i, message in enumerate(messages):
        calls = next((name for name in ("tool_calls", "function_call") if name in message), None)
        if calls and not content_text(message) and calls not in template.source:
            raise InputError(
                f"messages[{i}] has {calls}, and {template.name} writes none; give a template for models "
                "that call tools, as a Jinja file"
            )


def _render_marked(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    variables: dict[str, Any],
    add_generation_prompt: bool,
    matcher: _MarkerMatcher,
    sentinel: str,
    tokenizer: Tokenizer,
) -> str:
    """Renders a template with a sentinel in every marker that was written, all or in part, by a message.

    A template may write a marker from a message that holds none, by deleting or replacing characters. If it
    changes messages, it is rendered again with a seam between all of their characters: that gives the same
    text, and shows where each character came from; or it must give the same markers without a seam.

    Raises:
      InputError: if it does not.
    """

    def guard(text: str) -> str:
        return matcher.insert_sentinels(text, sentinel, tokenizer)

    def render(messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        rendered = _render(template, messages, variables, add_generation_prompt)
        return rendered.replace(_escaped(sentinel), sentinel)

    guarded_variables = {name: map_texts(guard, value) for name, value in variables.items()}
    guarded = [
        {**map_texts(guard, message), "role": matcher.guard_role(message["role"], sentinel)}
        for message in messages
    ]
    rendered = render(guarded, guarded_variables)
    if _in_order([text.strip() for message in guarded for text in _said(message)], rendered):
        return rendered
    # ASCII, and no white space: what drops or strips other characters keeps it.
    used = set().union(template.source, *texts([messages, variables]))
    seam = next((c for c in map(chr, range(1, 9)) if c not in used), sentinel)
    apart = [
        {**safe, **{name: map_said(seam.join, message[name]) for name in _SAID if name in message}}
        for safe, message in zip(guarded, messages, strict=True)
    ]
    try:
        seamed = render(apart, guarded_variables).replace(seam, sentinel)
    except LlamaJaxError:  # the template looks for something in the message
        return rendered
    if seamed.replace(sentinel, "") == rendered.replace(sentinel, ""):
        return seamed
    if matcher.whole(seamed, sentinel) == matcher.whole(rendered, sentinel):
        return rendered
    raise InputError(
        f"{template.name} changes a message so that it spells a control token, which only the template may "
        "write; leave it out of the message, or give a template that writes messages as they are"
    )


_SAID = ("content", "reasoning_content", "thinking")


def _said(message: Mapping[str, Any]) -> Iterator[str]:
    """Yields the texts of a message's reasoning and content."""
    if "reasoning_content" in message:
        yield from texts(message["reasoning_content"])
    yield content_text(message)


def _in_order(parts: Sequence[str], text: str) -> bool:
    """Returns whether a text contains all parts, one after the other."""
    position = 0
    for part in parts:
        found = text.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    return True


def _escaped(character: str) -> str:
    """Returns how JSON in ASCII, and Python's repr, write a private-use character."""
    return json.dumps(character)[1:-1]


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

    def guard_role(self, role: str, sentinel: str) -> str:
        """Returns a role with a sentinel inside if a template could write a marker around it."""
        if role in ROLES or not any(role in marker for marker in self._markers):
            return role
        return f"{role[:1]}{sentinel}{role[1:]}"

    def whole(self, rendered: str, sentinel: str) -> list[str]:
        """Returns the markers of a rendered text without a sentinel inside, in order."""
        return [marker for part in rendered.split(sentinel) for marker in self._exact.findall(part)]

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
    """Returns a private-use character that occurs in none of the texts, not even escaped.

    Raises:
      InputError: if they hold all of them.
    """
    used = set().union(*texts)
    for character in _private_use():
        if character not in used and not any(_escaped(character) in text for text in texts):
            return character
    raise InputError("the messages and their template hold every private-use character; leave some out")


def _private_use() -> Iterator[str]:
    for first, last in ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)):
        yield from map(chr, range(first, last + 1))
