"""Conversations as Hugging Face's transformers takes them: messages, tools and other variables, checked."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from llama_jax.errors import InputError

Messages = Sequence[Mapping[str, Any]]
Variables = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

_ROLE = re.compile(r"[A-Za-z][\w.-]{0,39}")
# Names of one field, of which templates read the first two.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_WITHOUT_CONTENT = ("tool_calls", "function_call", *_REASONING)
_RESERVED = ("messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
_MAX_DEPTH = 64


def validate_messages(messages: Messages) -> list[dict[str, Any]]:
    """Validates a conversation and returns a plain copy of its messages.

    A message has a role and a content: a text, or a list of texts and `{"type": "text", "text": ...}`. An
    assistant's message may have `tool_calls` or its reasoning instead. Other fields (`name`, `tool_call_id`,
    ...) are for the template. As in transformers, fields that are None are left out, and reasoning is under
    `reasoning_content`, whatever its name was. `weight`, 0 or 1, says whether a message is trained on; no
    template sees it.

    The content may be any text, including NUL and other control characters.

    Raises:
      InputError: if there are no messages; or naming the first message without role or content, with a
        content that is not text, or with a value that is nested too deeply or has a lone surrogate.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise InputError("there are no messages; give a list of {'role': 'user', 'content': '...'}")
    return [_validate_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _validate_message(message: Any, where: str) -> dict[str, Any]:
    fields = {}
    if isinstance(message, Mapping):
        fields = {str(name): value for name, value in message.items() if value is not None}
        if fields.get("tool_calls") == []:  # as Parquet has it in every message
            del fields["tool_calls"]
    if "role" not in fields or not any(name in fields for name in ("content", *_WITHOUT_CONTENT)):
        found = list(fields) if isinstance(message, Mapping) else type(message).__name__
        raise InputError(f"{where} is {str(found)[:60]}; it must have a role and a content")
    _check_role(fields["role"], where)
    if fields.get("weight", 1) not in (0, 1):
        raise InputError(
            f"{where}: weight is {repr(fields['weight'])[:40]}; it must be 0, not trained on, or 1"
        )
    if not isinstance(fields.get("tool_calls", []), list):
        kind = type(fields["tool_calls"]).__name__
        raise InputError(f"{where}: tool_calls is of type {kind}; it must be a list of calls")
    if "content" in fields:
        fields["content"] = _validate_content(fields["content"], where)
    checked = {name: _plain(value, f"{where}: {name}") for name, value in fields.items()}
    reasoning = next((checked[name] for name in _REASONING if name in checked), None)
    if reasoning is not None:
        checked = {"thinking": reasoning, **checked, "reasoning_content": reasoning}
    return checked


def _check_role(role: Any, where: str) -> None:
    if role in ROLES:
        return
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise InputError(f"{where}: role is {str(role)[:40]!r}; it must be a name such as {', '.join(ROLES)}")
    meant = difflib.get_close_matches(role.lower(), ("system", "user", "assistant"), n=1, cutoff=0.85)
    if meant:
        raise InputError(f"{where}: role is {role!r}; did you mean {meant[0]!r}?")


def _validate_content(content: Any, where: str) -> str | list[Any]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(
            f"{where}: content is of type {type(content).__name__}; it must be a str, or a list of text parts"
        )
    parts: list[Any] = []
    for i, part in enumerate(content):
        if not isinstance(part_text(part), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(
                f"{where}: content[{i}] is of type {str(kind)[:40]!r}, and the model reads text only; leave "
                "it out, or describe it in a part {'type': 'text', 'text': '...'}"
            )
        fields = part.items() if isinstance(part, Mapping) else ()
        # In Parquet every part has the fields of all parts.
        parts.append({name: value for name, value in fields if value is not None} or part)
    return parts


def part_text(part: Any) -> Any:
    """Returns the text of a part of a message's content; None if it has none."""
    if isinstance(part, Mapping):
        return part.get("text") if str(part.get("type", "text")).endswith("text") else None
    return part


def content_text(message: Mapping[str, Any]) -> str:
    """Returns the content of a validated message as one text, its parts joined."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(map(part_text, content))


def map_said(change: Callable[[str], str], content: Any) -> Any:
    """Returns a content with its text, or the text of its parts, changed."""
    if isinstance(content, list):
        return [map_said(change, part) for part in content]
    if isinstance(content, dict):
        return {**content, "text": change(content["text"])}
    return change(content) if isinstance(content, str) else content


def validate_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Returns a plain copy of tools, a list of JSON schemas or its JSON text; None if there are none.

    An empty list is None: Llama 3's templates write their instructions for it too.

    Raises:
      InputError: if it is something else.
    """
    if tools and isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InputError(f"tools is {tools[:40]!r}, which is not JSON; give a list of schemas") from None
    if not tools:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"tools is {repr(tools)[:60]}; it must be a list of JSON schemas, one a tool")
    return [_plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def validate_variables(variables: Variables) -> dict[str, Any]:
    """Returns a plain copy of a template's variables besides the messages, such as `tools`.

    Raises:
      InputError: for one that is set elsewhere, and as `validate_tools`.
    """
    for name in variables:
        if not isinstance(name, str) or name in _RESERVED:
            raise InputError(f"{str(name)[:40]!r} is not a variable of the chat template; leave it out")
    checked = {name: _plain(value, name) for name, value in variables.items() if name != "tools"}
    return {"tools": validate_tools(variables.get("tools")), "documents": None, **checked}


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """Returns a copy made of JSON values; as in transformers, another value becomes the name of its type."""
    if depth > _MAX_DEPTH:
        raise InputError(f"{where} is nested more than {_MAX_DEPTH} deep; simplify it")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where} has a lone surrogate, {value[error.start]!r}, at character {error.start}; replace "
                "it, for example with text.encode('utf-8', 'replace').decode()"
            ) from None
        return str(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {_plain(str(k), where): _plain(item, where, depth + 1) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    return f"<{type(value).__name__}>"


def texts(value: Any) -> Iterator[str]:
    """Yields every text in a plain value, the keys of its objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)


def map_texts(change: Callable[[str], str], value: Any) -> Any:
    """Returns a plain value with every text in it changed, the keys of its objects included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): map_texts(change, item) for key, item in value.items()}
    return [map_texts(change, item) for item in value] if isinstance(value, list) else value
