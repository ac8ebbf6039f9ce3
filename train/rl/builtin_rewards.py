"""Built-in reward functions, in TRL's calling convention; a completion is a text, or a list with one message.

`exact_match` and `numeric_match` compare with the data's column `answer`, or else `solution`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

NAMES = ("exact_match", "numeric_match", "math_verify", "format:REGEX", "overlong:MAX,CACHE")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?|-?\.\d+")


def text_of(completion: Any) -> str:
    """The text of a completion, or of the contents of its messages."""
    if isinstance(completion, str):
        return completion
    return "".join(str(message.get("content") or "") for message in completion)


def find(spec: str) -> Callable[..., Any] | None:
    """The built-in function of a name; None if it is none.

    Raises:
      ValueError: for an argument that it cannot have.
    """
    name, _, argument = spec.partition(":")
    plain = {"exact_match": exact_match, "numeric_match": numeric_match, "math_verify": math_verify}
    if spec in plain:
        if spec == "math_verify":
            importlib.import_module(spec)  # the error at the start, if it is not installed
        return plain[spec]
    if name == "format" and argument:
        return matches(re.compile(argument, re.DOTALL))
    if name == "overlong":
        sizes = argument.split(",")
        if len(sizes) != 2 or not all(size.strip().isdigit() and int(size) > 0 for size in sizes):
            raise ValueError("overlong needs two numbers of tokens, as in overlong:512,128")
        return overlong(*map(int, sizes))
    return None


def exact_match(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the completion is the answer, but for space around it; else 0."""
    pairs = zip(completions, _answers(columns), strict=True)
    return [float(text_of(completion).strip() == str(answer).strip()) for completion, answer in pairs]


def numeric_match(completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the completion's last number is the answer's last number; else 0."""
    pairs = zip(completions, _answers(columns), strict=True)
    return [
        float(_last_number(text_of(completion)) == _last_number(str(answer)) is not None)
        for completion, answer in pairs
    ]


def math_verify(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1 where math-verify finds the completion equal to the answer; None where that is no expression."""
    library = importlib.import_module("math_verify")  # a package of the user's choice
    rewards: list[float | None] = []
    for completion, answer in zip(completions, _answers(columns), strict=True):
        gold = library.parse(str(answer))
        rewards.append(float(library.verify(gold, library.parse(text_of(completion)))) if gold else None)
    return rewards


def matches(pattern: re.Pattern[str]) -> Callable[..., list[float]]:
    """Makes the reward that is 1 where a pattern matches the whole completion; else 0."""

    def reward(completions: Sequence[Any], **_: Any) -> list[float]:
        return [
            float(pattern.fullmatch(text_of(completion).strip()) is not None) for completion in completions
        ]

    return reward


def overlong(maximum: int, cache: int) -> Callable[..., list[float]]:
    """Makes DAPO's soft punishment of length (arXiv 2503.14476, equation 13).

    0 up to `maximum - cache` tokens, then linearly down to -1 at `maximum`, and -1 above.
    """

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [max(-1.0, min(0.0, (maximum - cache - len(ids)) / cache)) for ids in completion_ids]

    return reward


def _answers(columns: dict[str, Any]) -> Sequence[Any]:
    for name in ("answer", "solution"):
        if name in columns:
            return columns[name]
    raise KeyError("the data has no column 'answer' or 'solution'")


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
