"""The conversations of records: messages of OpenAI and ShareGPT, tools, weights and template variables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llama_jax.chat import content_text, validate_messages, validate_variables
from llama_jax.chat.messages import ROLES
from llama_jax.errors import InputError

from .records import BadRecord

Row = Mapping[str, Any]
Messages = list[dict[str, Any]]

VARIABLES = ("tools", "chat_template_kwargs")  # fields beside a record's messages, which are for the template

# The roles of ShareGPT and of the programs that extended it. A function call is an assistant's message.
_SPEAKERS = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation.

    Attributes:
      messages: validated; the assistant's turns from messages[first] on are trained on, but for those whose
        `weight` is 0.
      first: see there.
      variables: the template's other variables, such as `tools`.
    """

    messages: Messages
    first: int = 0
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def texts(self) -> Iterator[str]:
        """Yields the contents of the messages."""
        return map(content_text, self.messages)


def read_messages(row: Row, name: str) -> Messages:
    """Returns the validated messages of a field, in OpenAI's or ShareGPT's format, or as JSON text.

    Raises:
      BadRecord: if they are malformed.
    """
    value = row[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value)
    if not isinstance(value, list) or not value:
        kind = "empty" if value == [] else f"of type {type(value).__name__}, not a list"
        raise BadRecord("no messages", f"field {name!r} is {kind}; it must be a list of messages")
    messages = [_from_sharegpt(message, f"{name}[{i}]") for i, message in enumerate(value)]
    try:
        return validate_messages(messages)
    except InputError as error:
        details = str(error).replace("messages[", f"{name}[", 1)
        reasons = {"lone surrogate": "lone surrogate", ": role is": "unknown role"}
        reason = next((kind for part, kind in reasons.items() if part in details), "malformed message")
        raise BadRecord(reason, details) from None


def _from_sharegpt(message: Any, where: str) -> Any:
    """Returns a message with ShareGPT's names, `from` and `value`, in OpenAI's; another one as it is."""
    if not isinstance(message, Mapping) or message.get("from") is None or "role" in message:
        return message
    speaker, content = message["from"], message.get("value")
    role = _SPEAKERS.get(str(speaker), speaker)
    if role not in ROLES:
        known = ", ".join(dict.fromkeys((*ROLES, *_SPEAKERS)))
        raise BadRecord("unknown role", f"{where}: role is {str(speaker)[:40]!r}; it must be {known}")
    rest = {name: part for name, part in message.items() if name not in ("from", "value")}
    if speaker in ("function_call", "tool_call") and (calls := _calls(content)):
        return {**rest, "role": role, "tool_calls": calls}
    return {**rest, "role": role, "content": content}


def _calls(text: Any) -> list[dict[str, Any]] | None:
    """Returns the function calls in a text of JSON, one or a list; None if it is something else."""
    parsed = _parsed(text) if isinstance(text, str) else text
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return None
    return [{"type": "function", "function": call} for call in calls]


def _parsed(value: Any) -> Any:
    """Returns the value of JSON text; of another value or text, itself."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def read_variables(row: Row) -> dict[str, Any]:
    """Returns the variables that a record gives the template: `tools`, and `chat_template_kwargs`.

    As in TRL the former may be JSON text; here the latter too.

    Raises:
      BadRecord: if they are malformed.
    """
    given = {name: row[name] for name in VARIABLES if row.get(name) not in (None, "")}
    others = _parsed(given.pop("chat_template_kwargs", {}))
    if not isinstance(others, dict):
        kind = type(others).__name__
        raise BadRecord("malformed tools", f"chat_template_kwargs is of type {kind}; it must be an object")
    if not (given := {**given, **others}):
        return {}
    try:
        checked = validate_variables(given)
    except InputError as error:
        raise BadRecord("malformed tools", str(error)) from None
    return {name: value for name, value in checked.items() if value is not None}


def with_system(row: Row, messages: Messages) -> Messages:
    """Returns the messages after a record's field `system`, if it has one and they have none."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def with_answers(
    messages: Messages, first: int = 0, name: str = "", variables: Mapping[str, Any] | None = None
) -> Conversation:
    """Returns a conversation.

    Raises:
      BadRecord: if it has no answers to train on, or an empty one.
    """
    of = f"field {name!r} has " if name else ""
    answers = [message for message in messages[first:] if message["role"] == "assistant"]
    if not answers:
        raise BadRecord("no assistant turn", f"{of}no assistant turn to train on")
    learned = [answer for answer in answers if answer.get("weight", 1)]
    if not learned:
        raise BadRecord("no assistant turn", f"{of}no assistant turn to train on: each has weight 0")
    if not all(map(_says_something, learned)):
        raise BadRecord("empty answer", f"{of}an empty assistant turn")
    return Conversation(messages, first, dict(variables or {}))


def _says_something(message: Mapping[str, Any]) -> bool:
    others: Iterable[str] = ("tool_calls", "function_call", "reasoning_content")
    return bool(content_text(message).strip()) or any(message.get(name) for name in others)
