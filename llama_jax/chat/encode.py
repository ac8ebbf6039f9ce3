"""A conversation to token ids, with what people wrote kept apart from what the template did.

The text that a template renders is encoded as Hugging Face's transformers do it, with one rule on top: a
control token, or another mark of a turn like Llama 2's `[INST]`, counts only where the template wrote all
of it. Typed in a message it is text.
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

# Marks of turns that some vocabularies hold no control token for.
_TAG = re.compile(r"\[/?INST\]|<</?SYS>>|<\|[^\s<>|]{1,40}\|>")


def checked_messages(messages: Messages) -> list[dict[str, str]]:
    """Returns a copy of a conversation's messages.

    A content may be any text: NUL and other control characters are ordinary.

    Raises:
      InputError: naming the first message that has another role than system, user and assistant, no
        content, a lone surrogate in it, or something else beside it; or if there is no message.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise InputError("there are no messages; give a list of {'role': 'user', 'content': '...'}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            has = list(message) if isinstance(message, Mapping) else type(message).__name__
            raise InputError(f"messages[{i}] is {str(has)[:60]}; it must have a role and a content, no more")
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
    """Returns the text that the template makes of a conversation; see `encode_chat`."""
    return _render(template, checked_messages(messages), add_generation_prompt)


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
    """Turns a conversation into the ids of a prompt.

    They are those of Hugging Face's `apply_chat_template`: control tokens in the text that the template
    writes become their ids, and BOS is there if the template writes it, whatever rule the vocabulary has
    for other texts; two at the very beginning count as one.

    Spelled in a message, a control token of the vocabulary is text, and so is a mark of the kinds `[INST]`,
    `<<SYS>>` and `<|...|>` that the template itself uses: it gets other ids than the template's, which
    decode to the same characters.

    Args:
      tokenizer: the vocabulary.
      template: from `chat_template`.
      messages: each with a role (system, user or assistant) and a content.
      add_generation_prompt: whether to end with what opens the assistant's answer.

    Returns:
      The ids, a list of int.

    Raises:
      InputError: for malformed messages (see `checked_messages`), or ones that the template refuses.
      TokenizerError: for a template that does not render, or takes too much time or memory.
    """
    messages = checked_messages(messages)
    marks = filter(None, (*tokenizer.special_tokens, *_TAG.findall(template.source)))
    spellings = _spellings(frozenset(marks))
    seam = _unused_character([template.source, *(message["content"] for message in messages)])
    sewn = [{**m, "content": spellings.sew(m["content"], seam, tokenizer)} for m in messages]
    first, *rest = spellings.cut(_render(template, sewn, add_generation_prompt), seam)
    ids = tokenizer.encode(first, add_bos=False, parse_special=True)
    opening = tokenizer.encode(seam, add_bos=False) if rest else []
    for part in rest:
        ids += _continued(tokenizer, part, seam, opening)
    while tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
        del ids[0]
    if not ids:
        raise InputError(f"{template.name} makes no text of these messages; give another template")
    return ids


class _Spellings:
    """The marks that only a template may write, and a way to tell whether it did.

    Before rendering, messages that hold a mark, or could complete one at either end, get a character that
    occurs nowhere else, the seam, inside of it. Wherever a rendered mark has a seam inside, part of it
    came from a message: there the text is cut and its parts are encoded apart. All other seams are dropped.
    """

    def __init__(self, marks: frozenset[str]):
        longest_first = sorted(map(re.escape, marks), key=len, reverse=True)
        # Matches are empty, so that what they find may overlap. A template may change a message's case. The
        # first characters are looked at first: there may be hundreds of marks.
        first = "".join(sorted({re.escape(mark[0]) for mark in marks})) or "\0"
        pattern = f"(?=[{first}])(?=({'|'.join(longest_first) or '(?!)'}))"
        self._marks, self._any_case = re.compile(pattern), re.compile(pattern, re.IGNORECASE)
        self._all = marks
        self._beginnings = {mark[:n] for mark in marks for n in range(1, len(mark))}
        self._endings = {mark[n:] for mark in marks for n in range(1, len(mark))}
        self._longest = max(map(len, marks), default=0)

    def sew(self, content: str, seam: str, tokenizer: Tokenizer) -> str:
        """Returns `content` with seams, or as it is if it has to do with no mark."""
        middles = functools.cache(functools.partial(self._middles, tokenizer))
        at = {m.start() + n for m in self._any_case.finditer(content) for n in middles(m[1])}
        # At the ends of what a template that trims would leave.
        start, end = len(content) - len(content.lstrip()), len(content.rstrip())
        lengths = range(1, min(self._longest, end - start + 1))
        if any(content[start : start + n] in self._endings for n in lengths):
            at.add(start)
        if any(content[end - n : end] in self._beginnings for n in lengths):
            at.add(end)
        return seam.join(_split(content, sorted(at)))

    def cut(self, rendered: str, seam: str) -> list[str]:
        """Returns the parts of a rendered text that are encoded apart, without the seams."""
        seams, before = [], 0
        for part in rendered.split(seam)[:-1]:
            before += len(part)
            seams.append(before)
        text = rendered.replace(seam, "")
        if not seams:
            return [text]
        inside: set[int] = set()
        for m in self._marks.finditer(text):
            after, end = bisect.bisect_right(seams, m.start()), m.start() + len(m[1])
            inside.update(seams[after : bisect.bisect_left(seams, end)])
        return _split(text, sorted(inside))

    def _middles(self, tokenizer: Tokenizer, typed: str) -> list[int]:
        """Where to cut a mark, in any case, and the shorter ones that it begins with."""
        begins = [mark for mark in self._all if typed.lower().startswith(mark.lower())]
        return [_middle(tokenizer, typed[: len(mark)]) for mark in begins]


@functools.lru_cache(maxsize=8)
def _spellings(marks: frozenset[str]) -> _Spellings:
    return _Spellings(marks)


def _split(text: str, at: Sequence[int]) -> list[str]:
    return [text[start:end] for start, end in zip((0, *at), (*at, len(text)), strict=True)]


def _middle(tokenizer: Tokenizer, mark: str) -> int:
    """Where to cut a mark so that its parts have other ids than the whole: inside its longest piece.

    Raises:
      InputError: for a mark of one character.
    """
    if len(mark) == 1:
        raise InputError(
            f"a message holds {mark!r}, which is a control token of this vocabulary; leave it out"
        )
    stream = tokenizer.stream(skip_special_tokens=False)
    lengths = [len(stream.push(token)) for token in tokenizer.encode(mark, add_bos=False)]
    longest = lengths.index(max(lengths))
    return min(sum(lengths[:longest]) + (lengths[longest] + 1) // 2, len(mark) - 1) or 1


def _continued(tokenizer: Tokenizer, text: str, seam: str, opening: list[int]) -> list[int]:
    """Returns the ids of a text that goes on after another, without the space that opens SentencePiece's.

    `opening` are those of a text that is the seam alone, with which no piece of a vocabulary can merge.
    """
    ids = tokenizer.encode(seam + text, add_bos=False, parse_special=True)
    if ids[: len(opening)] == opening:
        return ids[len(opening) :]
    return tokenizer.encode(text, add_bos=False, parse_special=True)  # unless it is of bytes


def _unused_character(texts: Sequence[str]) -> str:
    """Returns a private-use character that none of the texts holds."""
    used = set().union(*texts)
    return next(character for character in _private_use() if character not in used)


def _private_use() -> Iterator[str]:
    for first, last in ((0xE000, 0xF8FF), (0xF0000, 0xFFFFD), (0x100000, 0x10FFFD)):
        yield from map(chr, range(first, last + 1))
