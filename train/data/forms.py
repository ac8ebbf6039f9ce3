"""What the records of finetuning data say: their forms, told by their fields, read into examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llama_jax.chat import checked_messages
from llama_jax.chat.encode import ROLES
from llama_jax.errors import InputError

from ..config.objective import PAIRS, Objective
from .lines import named
from .records import BadRecord

Row = Mapping[str, Any]
Messages = list[dict[str, str]]

_SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant"}  # ShareGPT's names

# Stanford Alpaca's prompts (github.com/tatsu-lab/stanford_alpaca, train.py).
_ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclasses.dataclass(frozen=True)
class Turns:
    """A conversation, of which the assistant's turns from messages[first] on are learned."""

    messages: Messages
    first: int = 0


@dataclasses.dataclass(frozen=True)
class Plain:
    """Text without a template: what is given, and what is learned."""

    prompt: str
    answer: str


Side = Turns | Plain


@dataclasses.dataclass(frozen=True)
class Example:
    """What one record says.

    Attributes:
      sides: one; of a preference pair two, what was chosen and what was rejected.
      value: the label, or the pair's margin.
    """

    sides: tuple[Side, ...]
    value: float = 0.0


@dataclasses.dataclass(frozen=True)
class Forms:
    """The forms that an objective accepts.

    Attributes:
      objective: of the run.
      field: the field that holds plain text.
      templated: whether there is a template, which Alpaca's records then go through.
      labels: names of the classes, in the order of their numbers.
    """

    objective: Objective
    field: str
    templated: bool
    labels: tuple[str, ...] = ()

    def fields(self) -> dict[str, tuple[str, ...]]:
        """Returns the fields of each form, the first that fits a record being its own."""
        one: dict[str, tuple[str, ...]] = {"messages": ("messages",), "sharegpt": ("conversations",)}
        if self.objective in PAIRS:
            return {"pair": ("chosen", "rejected")}
        if self.objective == "sft":
            one |= {"prompt": ("prompt", "completion"), "alpaca": ("instruction", "output")}
            return {**one, "text": (self.field,)}
        return {name: (*fields, "label") for name, fields in {**one, "text": (self.field,)}.items()}

    def columns(self, form: str) -> list[str]:
        """Returns every field that a form may use."""
        optional = {"alpaca": ("input",), "pair": ("prompt", "margin")}
        return [*self.fields()[form], *optional.get(form, ())]

    def detect(self, row: Row) -> str:
        """Returns the name of a record's form.

        Raises:
          BadRecord: if it has none, naming the fields and the forms.
        """
        has = {name for name, value in row.items() if value is not None}
        for form, fields in self.fields().items():
            if has.issuperset(fields):
                return form
        forms = "; ".join(" and ".join(fields) for fields in self.fields().values())
        raise BadRecord(
            "no known form",
            f"its fields are {named(row)}, and a record for {self.objective} has: {forms}",
        )

    def read(self, form: str, row: Row) -> Example:
        """Returns what a record says.

        Raises:
          BadRecord: if it is not of the form, or cannot be learned from.
        """
        for name in self.fields()[form]:
            if row.get(name) is None:
                raise BadRecord("no such field", f"no field {name!r} (fields: {named(row)})")
        if form == "pair":
            return Example(_pair(row), _number(row, "margin") if row.get("margin") is not None else 0.0)
        if self.objective == "sft":
            return Example((self._learned(form, row),))
        if form == "text":
            return Example((Plain("", _filled(row, self.field, "empty text")),), self._label(row))
        return Example((Turns(_messages(row, *self.fields()[form][:1])),), self._label(row))

    def _learned(self, form: str, row: Row) -> Side:
        if form == "text":
            return Plain("", _filled(row, self.field, "empty text"))
        if form == "prompt":
            return _answer(row, "completion")
        if form == "alpaca":
            asked, given = _text(row, "instruction"), _text(row, "input") if row.get("input") else ""
            output = _filled(row, "output")
            if not self.templated:
                wording = _ALPACA_INPUT if given else _ALPACA
                return Plain(wording.format(instruction=asked, input=given), output)
            said = f"{asked}\n\n{given}" if given else asked
            return _answered([{"role": "user", "content": said}, {"role": "assistant", "content": output}])
        return _answered(_messages(row, *self.fields()[form]))

    def _label(self, row: Row) -> float:
        if self.objective == "regress":
            return _number(row, "label")
        value = row["label"]
        if isinstance(value, str):
            if value not in self.labels:
                raise BadRecord(
                    "unknown label", f"label is {value[:40]!r}, and data.labels has {named(self.labels)}"
                )
            return float(self.labels.index(value))
        number = _number({"label": int(value) if isinstance(value, bool) else value}, "label")
        if number != int(number) or not 0 <= number < len(self.labels):
            raise BadRecord(
                "label out of range",
                f"label is {value!r}; classes are whole numbers 0 to {len(self.labels) - 1}",
            )
        return number


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise BadRecord("field is not text", f"field {name!r} is of type {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            "lone surrogate", f"field {name!r} has a lone surrogate, {value[error.start]!r}"
        ) from None
    return value


def _filled(row: Row, name: str, reason: str = "empty answer") -> str:
    text = _text(row, name)
    if not text.strip():
        raise BadRecord(reason, f"field {name!r} is empty")
    return text


def _number(row: Row, name: str) -> float:
    """Returns a number that f32 holds."""
    value = row[name]
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number) and abs(number) <= float(np.finfo(np.float32).max):
                return number
    except OverflowError:
        pass
    raise BadRecord(f"{name} is no number", f"{name} is {repr(value)[:40]}; it must be a finite number")


def _messages(row: Row, name: str) -> Messages:
    """Returns the messages in a field, in either form, checked."""
    value = row[name]
    if not isinstance(value, list) or not value:
        kind = "empty" if value == [] else f"of type {type(value).__name__}, not a list"
        raise BadRecord("no messages", f"field {name!r} is {kind}; it must hold messages")
    messages = []
    for i, message in enumerate(value):
        if isinstance(message, dict):
            # Parquet gives every message the fields that any message has.
            message = {key: part for key, part in message.items() if part is not None}
            if set(message) == {"from", "value"}:
                role = message["from"]
                message = {"role": _SPEAKERS.get(str(role), role), "content": message["value"]}
            if (role := message.get("role", "user")) not in ROLES:
                raise BadRecord(
                    "unknown role",
                    f"{name}[{i}]: role is {str(role)[:40]!r}; it must be {', '.join(ROLES)}",
                )
        messages.append(message)
    try:
        return checked_messages(messages)
    except InputError as error:
        said = str(error).replace("messages[", f"{name}[", 1)
        reason = "lone surrogate" if "lone surrogate" in said else "malformed message"
        raise BadRecord(reason, said) from None


def _answered(messages: Messages, first: int = 0, name: str = "") -> Turns:
    """Returns a conversation whose answers, of which there are some, all say something."""
    of = f"field {name!r} has " if name else ""
    answers = [message["content"] for message in messages[first:] if message["role"] == "assistant"]
    if not answers:
        raise BadRecord("no assistant turn", f"{of}no turn of the assistant to learn from")
    if not all(answer.strip() for answer in answers):
        raise BadRecord("empty answer", f"{of}an empty turn of the assistant")
    return Turns(messages, first)


def _answer(row: Row, name: str) -> Side:
    """Returns what is in the field `name` as the answer to the field `prompt`."""
    if isinstance(row["prompt"], str) and isinstance(row[name], str):
        return Plain(_text(row, "prompt"), _filled(row, name))
    if isinstance(row["prompt"], str) or isinstance(row[name], str):
        raise BadRecord(
            "malformed message", f"of 'prompt' and {name!r} one is text; give both as text, or as messages"
        )
    prompt, answer = _messages(row, "prompt"), _messages(row, name)
    return _answered(answer if answer[: len(prompt)] == prompt else prompt + answer, len(prompt), name)


def _pair(row: Row) -> tuple[Side, Side]:
    """Returns both answers, each with its prompt, by TRL's conventions.

    Without a field `prompt`, or with a text there beside messages, the prompt is what both begin with: the
    messages, or the words.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise BadRecord("identical answers", "chosen and rejected are the same; there is nothing to prefer")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecord("malformed message", "of chosen and rejected one is text; give both in one form")
    prompt = row.get("prompt")
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return _answer(row, "chosen"), _answer(row, "rejected")
    if not isinstance(chosen, str):
        return _shared_turns(_messages(row, "chosen"), _messages(row, "rejected"))
    if prompt is not None:
        raise BadRecord(
            "malformed message", "'prompt' is a list and the answers are text; give both in one form"
        )
    return _shared_words(_filled(row, "chosen"), _filled(row, "rejected"))


def _shared_turns(chosen: Messages, rejected: Messages) -> tuple[Side, Side]:
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if not shared or chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise BadRecord(
            "prompts differ", "chosen and rejected must be the same messages up to an answer of the assistant"
        )
    return _answered(chosen, shared, "chosen"), _answered(rejected, shared, "rejected")


def _shared_words(chosen: str, rejected: str) -> tuple[Side, Side]:
    most = min(len(chosen.rstrip()), len(rejected.rstrip())) - 1  # both are to go on with something
    same = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    while same and not (chosen[same].isspace() and rejected[same].isspace()):
        same -= 1  # to before the word in which they differ
    if not chosen[:same].strip():
        raise BadRecord(
            "prompts differ", "chosen and rejected do not begin with the same words, their prompt"
        )
    return Plain(chosen[:same], chosen[same:]), Plain(rejected[:same], rejected[same:])
