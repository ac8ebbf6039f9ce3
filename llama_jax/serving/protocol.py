"""OpenAI's request bodies: what of them is known, checked field by field, as requests of a `Batcher`."""

from __future__ import annotations

import dataclasses
import difflib
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

_COUNT = 1 << 31


class ApiError(Exception):
    """An error in OpenAI's form.

    Attributes:
      status: of HTTP.
      body: `{"error": {"message", "type", "param", "code"}}`.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`kind` is OpenAI's `type`."""
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.headers = dict(headers or {})


@dataclasses.dataclass(frozen=True)
class Body:
    """The fields that both endpoints have, and those of one; see OpenAI's reference.

    Attributes:
      prompts: of completions: texts, or lists of ids.
      messages: of a chat.
      settings: the names of `Sampling` and their values, and the seed.
      max_tokens: None is as many as there is room for.
      stop: stop strings.
      n: continuations of each prompt.
      stream: whether the answer is streamed.
      include_usage: whether the last chunk of a stream has the usage.
      top_logprobs: alternatives of each token; None is no log-probabilities.
      echo: of completions: whether the text begins with the prompt.
      schema: the JSON schema that the text must fill, of `response_format`; None is any text.
    """

    prompts: list[str] | list[list[int]]
    messages: list[Any]
    settings: dict[str, Any]
    max_tokens: int | None
    stop: list[str]
    n: int
    stream: bool
    include_usage: bool
    top_logprobs: int | None
    echo: bool
    schema: dict[str, Any] | None = None


def read_body(body: Any, *, chat: bool, max_n: int, max_top: int) -> Body:
    """Checks a request's body.

    Args:
      body: parsed JSON.
      chat: whether it is of a chat, or else of completions.
      max_n: the most continuations.
      max_top: the most alternatives of a token.

    Raises:
      ApiError: naming the first field that is unknown, of a wrong type, out of range, or not supported.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    known = {"model", *_COMMON, *_IGNORED, *_NOT_SUPPORTED, *(_CHAT if chat else _COMPLETIONS)}
    for name in body:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ApiError(400, f"unknown argument {name[:40]!r}{hint}", param=name[:40])
    for name, off in _NOT_SUPPORTED.items():
        if body.get(name) not in (None, *off):
            raise ApiError(400, f"{name} is not supported by this server", param=name, code="unsupported")
    fields = _Fields(body)
    settings = {
        "temperature": fields.number("temperature", 0, 2, default=1.0),
        "top_p": fields.number("top_p", 0, 1, default=1.0),
        "top_k": fields.integer("top_k", 0, _COUNT - 1, default=0),
        "min_p": fields.number("min_p", 0, 1, default=0.0),
        "repetition_penalty": fields.number("repetition_penalty", 0, 1e3, default=1.0),
        "presence_penalty": fields.number("presence_penalty", -2, 2, default=0.0),
        "frequency_penalty": fields.number("frequency_penalty", -2, 2, default=0.0),
        "suppress_tokens": _banned(body.get("logit_bias")),
        "seed": fields.integer("seed", -(1 << 63), (1 << 63) - 1, default=secrets.randbits(62)),
    }
    if settings["top_p"] == 0:  # as OpenAI takes it: the most likely token
        settings |= {"top_p": 1.0, "top_k": 1}
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options is not an object", param="stream_options")
    n = fields.integer("n", 1, max_n, default=1)
    if body.get("best_of") not in (None, n):
        raise ApiError(400, "best_of is not supported; it must be n, or left out", param="best_of")
    return Body(
        prompts=[] if chat else _prompts(body),
        messages=_messages(body) if chat else [],
        settings=settings,
        max_tokens=_max_tokens(fields, chat),
        stop=_stop(body.get("stop")),
        n=n,
        stream=fields.boolean("stream"),
        include_usage=_Fields(options).boolean("include_usage"),
        top_logprobs=_top_logprobs(fields, chat, max_top),
        echo=fields.boolean("echo"),
        schema=_schema(body.get("response_format")),
    )


def _schema(value: Any) -> dict[str, Any] | None:
    """The JSON schema of a `response_format`; of `json_object` that of any object.

    Raises:
      ApiError: for anything that is no format.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise ApiError(
            400,
            f"response_format of type {_shown(kind)} is unknown; give one of 'text', 'json_object' and "
            "'json_schema'",
            param="response_format",
        )
    given = value.get("json_schema")
    schema = given.get("schema") if isinstance(given, dict) else None
    if not isinstance(schema, dict):
        raise ApiError(
            400,
            "response_format of type 'json_schema' has no schema; give {'type': 'json_schema', "
            "'json_schema': {'name': ..., 'schema': {...}}}",
            param="response_format",
        )
    return schema


_COMMON = (
    *(
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ),
    *(
        "logit_bias",
        "max_tokens",
        "stop",
        "n",
        "seed",
        "stream",
        "stream_options",
        "logprobs",
        "response_format",
    ),
)
_COMPLETIONS = ("prompt", "echo", "best_of")
_CHAT = ("messages", "max_completion_tokens", "top_logprobs")
# What changes nothing of an answer.
_IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_options", "prompt_cache_retention"),
)
# What would, and the values with which it does not.
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "audio": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


@dataclasses.dataclass(frozen=True)
class _Fields:
    """Typed access to the fields of a body; null is as if a field were left out."""

    body: Mapping[str, Any]

    def number(self, name: str, low: float, high: float, *, default: float) -> float:
        return float(
            self._checked(name, (int, float), f"a number from {low:g} to {high:g}", low, high, default)
        )

    def integer(self, name: str, low: int, high: int, *, default: int) -> int:
        return int(self._checked(name, (int,), f"a whole number from {low} to {high}", low, high, default))

    def boolean(self, name: str) -> bool:
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            raise ApiError(400, f"{name} is {_shown(value)}; it must be true or false", param=name)
        return bool(value)

    def _checked(
        self, name: str, types: tuple[type, ...], rule: str, low: float, high: float, default: Any
    ) -> Any:
        value: Any = self.body.get(name)
        if value is None:
            return default
        is_number = isinstance(value, types) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise ApiError(400, f"{name} is {_shown(value)}; it must be {rule}", param=name)
        return value


def _shown(value: Any) -> str:
    return repr(value)[:40]


def _prompts(body: Mapping[str, Any]) -> list[str] | list[list[int]]:
    """One text or more, or one list of ids or more."""
    prompt = body.get("prompt")
    is_id: Callable[[Any], bool] = lambda x: isinstance(x, int) and not isinstance(x, bool)  # noqa: E731
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(text, str) for text in prompt):
            return prompt
        if all(map(is_id, prompt)):
            return [prompt]
        if all(isinstance(ids, list) and ids and all(map(is_id, ids)) for ids in prompt):
            return prompt
    raise ApiError(
        400,
        f"prompt is {_shown(prompt)}; it must be a text, a list of texts, a list of token ids, or a list of "
        "these",
        param="prompt",
    )


def _messages(body: Mapping[str, Any]) -> list[Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(
            400, f"messages is {_shown(messages)}; it must be a list of messages", param="messages"
        )
    return messages


def _max_tokens(fields: _Fields, chat: bool) -> int | None:
    name = "max_tokens"
    if chat and fields.body.get("max_completion_tokens") is not None:
        name = "max_completion_tokens"
    if fields.body.get(name) is None:
        return None if chat else 16  # OpenAI's defaults
    return fields.integer(name, 1, _COUNT - 1, default=0)


def _stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(x, str) and x for x in stops):
        raise ApiError(
            400, f"stop is {_shown(value)}; it must be a text, or a list of up to 16 texts", param="stop"
        )
    return stops


def _banned(bias: Any) -> list[int]:
    """The ids of a `logit_bias`, of which -100, a ban, and 0 are supported."""
    if bias is None:
        return []
    if not isinstance(bias, dict):
        raise ApiError(400, f"logit_bias is {_shown(bias)}; it must be an object", param="logit_bias")
    for name, value in bias.items():
        if not name.isdecimal() or value not in (0, -100):
            raise ApiError(
                400,
                f"logit_bias has {_shown(name)}: {_shown(value)}; it maps token ids to -100, which bans a "
                "token; no other bias is supported",
                param="logit_bias",
            )
    return [int(name) for name, value in bias.items() if value]


def _top_logprobs(fields: _Fields, chat: bool, most: int) -> int | None:
    """The number of alternatives: of completions `logprobs`, of a chat `top_logprobs`."""
    if not chat:
        given = fields.body.get("logprobs") is not None
        return fields.integer("logprobs", 0, most, default=0) if given else None
    wanted = fields.boolean("logprobs")
    count = fields.integer("top_logprobs", 0, most, default=0)
    if count and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    return count if wanted else None


def finite(logprob: float) -> float:
    """A log-probability as JSON can hold it; -9999 is OpenAI's for a token that cannot be."""
    return logprob if math.isfinite(logprob) else -9999.0
