"""The record formats of finetuning data: detected from the fields, and read into examples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config.objective import PAIR_OBJECTIVES, Objective
from .conversations import (
    VARIABLES,
    Conversation,
    Messages,
    Row,
    read_messages,
    read_variables,
    with_answers,
    with_system,
)
from .lines import list_names
from .records import BadRecord

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
class PlainText:
    """Text without a template: the prompt, and the answer that is trained on."""

    prompt: str
    answer: str

    def texts(self) -> tuple[str, ...]:
        """Returns the prompt and the answer."""
        return self.prompt, self.answer


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids, and a mask of those that are trained on."""

    ids: list[int]
    mask: list[int]

    def texts(self) -> tuple[str, ...]:
        """Returns no texts."""
        return ()


Side = Conversation | PlainText | Tokens


@dataclasses.dataclass(frozen=True)
class Example:
    """The content of one record.

    Attributes:
      sides: one, or the chosen and the rejected one of a preference pair.
      value: the label, which of KTO's is 1 for desirable and 0 for undesirable; or the pair's margin.
    """

    sides: tuple[Side, ...]
    value: float = 0.0


@dataclasses.dataclass(frozen=True)
class RecordFormats:
    """The record formats that an objective accepts.

    Attributes:
      objective: the run's.
      field: the field with plain text.
      has_template: whether there is a chat template; Alpaca records then use it.
      labels: class names, in the order of their ids.
    """

    objective: Objective
    field: str
    has_template: bool
    labels: tuple[str, ...] = ()

    def fields(self) -> dict[str, tuple[str, ...]]:
        """Returns the required fields of each format, in order of precedence."""
        common: dict[str, tuple[str, ...]] = {"messages": ("messages",), "sharegpt": ("conversations",)}
        if self.objective in PAIR_OBJECTIVES:
            return {"pair": ("chosen", "rejected")}
        if self.objective == "kto":
            return {"labeled": ("prompt", "completion", "label")}
        if self.objective == "sft":
            common |= {"prompt": ("prompt", "completion"), "alpaca": ("instruction", "output")}
            return {"tokens": ("input_ids",), **common, "text": (self.field,)}
        return {name: (*fields, "label") for name, fields in {**common, "text": (self.field,)}.items()}

    def columns(self, record_format: str) -> list[str]:
        """Returns every field that a format may use."""
        optional = {
            "messages": VARIABLES,
            "sharegpt": (*VARIABLES, "system"),
            "alpaca": ("input", "system"),
            "prompt": VARIABLES,
            "labeled": VARIABLES,
            "pair": ("prompt", "margin", *VARIABLES),
            "tokens": ("labels", *_MASKS),
        }
        return [*self.fields()[record_format], *optional.get(record_format, ())]

    def detect(self, row: Row) -> str:
        """Returns the name of a record's format.

        Raises:
          BadRecord: if no format matches, naming the fields and the formats.
        """
        present = {name for name, value in row.items() if value is not None}
        for record_format, fields in self.fields().items():
            if present.issuperset(fields):
                return record_format
        accepted = "; ".join(" and ".join(fields) for fields in self.fields().values())
        raise BadRecord(
            "unknown record format",
            f"its fields are {list_names(row)}, and a record for {self.objective} needs: {accepted}",
        )

    def read(self, record_format: str, row: Row) -> Example:
        """Reads a record.

        Raises:
          BadRecord: if it does not have the format, or cannot be trained on.
        """
        for name in self.fields()[record_format]:
            if row.get(name) is None:
                raise BadRecord("no such field", f"no field {name!r} (fields: {list_names(row)})")
        if record_format == "pair":
            return Example(_pair(row), _number(row, "margin") if row.get("margin") is not None else 0.0)
        if record_format == "labeled":
            return Example((_answer(row, "completion"),), _truth(row))
        if self.objective == "sft":
            return Example((self._sft_side(record_format, row),))
        if record_format == "text":
            return Example((PlainText("", _filled(row, self.field, "empty text")),), self._label(row))
        return Example((self._conversation(record_format, row),), self._label(row))

    def _conversation(self, record_format: str, row: Row) -> Conversation:
        messages = read_messages(row, self.fields()[record_format][0])
        if record_format == "sharegpt":
            messages = with_system(row, messages)
        return Conversation(messages, 0, read_variables(row))

    def _sft_side(self, record_format: str, row: Row) -> Side:
        if record_format == "tokens":
            return _tokens(row)
        if record_format == "text":
            return PlainText("", _filled(row, self.field, "empty text"))
        if record_format == "prompt":
            return _answer(row, "completion")
        if record_format == "alpaca":
            instruction, output = _text(row, "instruction"), _filled(row, "output")
            given_input = _text(row, "input") if row.get("input") else ""
            if not self.has_template:
                template = _ALPACA_INPUT if given_input else _ALPACA
                return PlainText(template.format(instruction=instruction, input=given_input), output)
            content = f"{instruction}\n\n{given_input}" if given_input else instruction
            messages = [{"role": "user", "content": content}, {"role": "assistant", "content": output}]
            return with_answers(with_system(row, messages))
        conversation = self._conversation(record_format, row)
        return with_answers(conversation.messages, variables=conversation.variables)

    def _label(self, row: Row) -> float:
        if self.objective == "regress":
            return _number(row, "label")
        value = row["label"]
        if isinstance(value, str):
            if value not in self.labels:
                raise BadRecord(
                    "unknown label", f"label is {value[:40]!r}, and data.labels has {list_names(self.labels)}"
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
    """Returns a number that f32 can represent."""
    value = row[name]
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number) and abs(number) <= float(np.finfo(np.float32).max):
                return number
    except OverflowError:
        pass
    raise BadRecord(f"{name} is not a number", f"{name} is {repr(value)[:40]}; it must be a finite number")


def _truth(row: Row) -> float:
    """Returns 1 if a completion is labeled desirable, 0 if undesirable."""
    value = row["label"]
    if not isinstance(value, bool):
        raise BadRecord(
            "label is not true or false",
            f"label is {repr(value)[:40]}; it must be true (desirable) or false (undesirable)",
        )
    return float(value)


_MASKS = ("completion_mask", "assistant_masks")  # of token ids, TRL's; each may only leave tokens out


def _tokens(row: Row) -> Tokens:
    """Returns token ids as TRL takes them: with `labels`, -100 where nothing is learned, or with masks."""
    columns = {name: row[name] for name in ("input_ids", "labels", *_MASKS) if row.get(name) is not None}
    ids = columns.pop("input_ids")
    for name, column in {"input_ids": ids, **columns}.items():
        if not isinstance(column, list) or not all(type(value) is int for value in column):
            raise BadRecord("not token ids", f"field {name!r} must be a list of whole numbers")
        if len(column) != len(ids):
            raise BadRecord(
                "not token ids", f"field {name!r} has {len(column)} entries, and input_ids {len(ids)}"
            )
    if not ids:
        raise BadRecord("empty text", "field 'input_ids' is empty")
    if "labels" in columns:
        mask = [int(label != -100) for label in columns["labels"]]
    else:
        mask = [int(all(bits)) for bits in zip(*columns.values(), strict=True)] or [1] * len(ids)
    return Tokens(ids, [0, *mask[1:]])  # the first token is not predicted


def _answer(row: Row, name: str) -> Side:
    """Returns the field `name` as the answer to the field `prompt`."""
    if isinstance(row["prompt"], str) and isinstance(row[name], str):
        return PlainText(_text(row, "prompt"), _filled(row, name))
    if isinstance(row["prompt"], str) or isinstance(row[name], str):
        raise BadRecord(
            "malformed message",
            f"one of 'prompt' and {name!r} is text, the other messages; use the same type for both",
        )
    prompt, answer = read_messages(row, "prompt"), read_messages(row, name)
    whole = answer if answer[: len(prompt)] == prompt else prompt + answer
    return with_answers(whole, len(prompt), name, read_variables(row))


def _pair(row: Row) -> tuple[Side, Side]:
    """Returns both answers, each with its prompt, following TRL's conventions.

    Without a field `prompt`, or if it is text and the answers are messages, the prompt is the common prefix
    of messages or words.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise BadRecord("identical answers", "chosen and rejected are the same; there is nothing to prefer")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRecord("malformed message", "one of chosen and rejected is text; use the same type for both")
    prompt = row.get("prompt")
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return _answer(row, "chosen"), _answer(row, "rejected")
    if not isinstance(chosen, str):
        messages = read_messages(row, "chosen"), read_messages(row, "rejected")
        return _split_common_messages(*messages, read_variables(row))
    if prompt is not None:
        raise BadRecord(
            "malformed message", "'prompt' is a list and the answers are text; use the same type for both"
        )
    return _split_common_words(_filled(row, "chosen"), _filled(row, "rejected"))


def _split_common_messages(
    chosen: Messages, rejected: Messages, variables: Mapping[str, Any]
) -> tuple[Side, Side]:
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if not shared or chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant":
        raise BadRecord(
            "prompts differ", "chosen and rejected must have the same messages up to an assistant answer"
        )
    return (
        with_answers(chosen, shared, "chosen", variables),
        with_answers(rejected, shared, "rejected", variables),
    )


def _split_common_words(chosen: str, rejected: str) -> tuple[Side, Side]:
    limit = min(len(chosen.rstrip()), len(rejected.rstrip())) - 1  # both answers must be non-empty
    same = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    while same and not (chosen[same].isspace() and rejected[same].isspace()):
        same -= 1  # back to the start of the word in which they differ
    if not chosen[:same].strip():
        raise BadRecord(
            "prompts differ", "chosen and rejected have no common first words, to be their prompt"
        )
    return PlainText(chosen[:same], chosen[same:]), PlainText(rejected[:same], rejected[same:])
