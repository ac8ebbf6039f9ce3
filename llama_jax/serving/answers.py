"""OpenAI's answers: whole ones, and the chunks of streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_jax.serving.protocol import ApiError, finite
from llama_jax.serving.requests import Token
from llama_jax.serving.service import Choice, Job, Service, usage
from llama_jax.serving.text_stream import Piece, token_bytes
from llama_jax.tokenizer import Tokenizer


def whole(service: Service, job: Job) -> dict[str, Any]:
    """The answer to a request all of whose rows have ended.

    Raises:
      ApiError: if one of them has failed, or run out of time.
    """
    choices = []
    for choice in job.choices:
        reason = finish_reason(choice)
        piece = choice.text.take(ended=True)
        text, logprobs = choice.before + piece.text, _logprobs(service, job, choice, piece)
        entry: dict[str, Any] = {"index": choice.index, "logprobs": logprobs, "finish_reason": reason}
        if job.chat:
            entry["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            entry["text"] = text
        choices.append(entry)
    kind = "chat.completion" if job.chat else "text_completion"
    return {**_head(service, job, kind), "choices": choices, "usage": usage(job)}


def first_chunk(service: Service, job: Job, choice: Choice) -> dict[str, Any] | None:
    """What the stream of a choice begins with; None for nothing."""
    if job.chat:
        return _chunk(service, job, choice, {"delta": {"role": "assistant", "content": "", "refusal": None}})
    return _chunk(service, job, choice, {"text": choice.before}) if choice.before else None


def chunk(service: Service, job: Job, choice: Choice, piece: Piece) -> dict[str, Any]:
    """A piece of a choice's text."""
    content = {"delta": {"content": piece.text}} if job.chat else {"text": piece.text}
    return _chunk(service, job, choice, content, _logprobs(service, job, choice, piece))


def last_chunk(service: Service, job: Job, choice: Choice) -> dict[str, Any]:
    """The end of a choice, with its reason.

    Raises:
      ApiError: as `whole`.
    """
    reason = finish_reason(choice)
    return _chunk(service, job, choice, {"delta": {}} if job.chat else {"text": ""}, None, reason)


def usage_chunk(service: Service, job: Job) -> dict[str, Any]:
    """The chunk of `stream_options.include_usage`."""
    kind = "chat.completion.chunk" if job.chat else "text_completion"
    return {**_head(service, job, kind), "choices": [], "usage": usage(job)}


def finish_reason(choice: Choice) -> str:
    """`stop` or `length`, of a choice that has ended.

    Raises:
      ApiError: for any other end.
    """
    try:
        reason = choice.handle.result(timeout=0).finish_reason
    except Exception as error:
        raise ApiError(500, f"generating failed: {error}", kind="server_error") from error
    if reason == "timeout":
        seconds = choice.handle.request.timeout
        raise ApiError(
            408,
            f"the request took more than {seconds:g} s; ask for fewer tokens, or try again later",
            kind="timeout_error",
            code="timeout",
        )
    if reason == "cancelled":
        raise ApiError(503, "the request was cancelled: the server is stopping", kind="server_error")
    return reason


def _head(service: Service, job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": service.name}


def _chunk(
    service: Service,
    job: Job,
    choice: Choice,
    content: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    entry = {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": reason}
    kind = "chat.completion.chunk" if job.chat else "text_completion"
    empty_usage = {"usage": None} if job.body.include_usage else {}
    return {**_head(service, job, kind), "choices": [entry], **empty_usage}


def _logprobs(service: Service, job: Job, choice: Choice, piece: Piece) -> dict[str, Any] | None:
    if job.body.top_logprobs is None:
        return None
    tokenizer = service.model.tokenizer
    if job.chat:
        content = [
            {
                **_token(tokenizer, token.id, token.logprob),
                "top_logprobs": [_token(tokenizer, *likely) for likely in token.top],
            }
            for token, _ in piece.tokens
        ]
        return {"content": content, "refusal": None}
    return {
        "tokens": [_text(tokenizer, token.id) for token, _ in piece.tokens],
        "token_logprobs": [finite(token.logprob) for token, _ in piece.tokens],
        "top_logprobs": [_by_text(tokenizer, token) for token, _ in piece.tokens]
        if job.body.top_logprobs
        else None,
        "text_offset": [len(choice.before) + place for _, place in piece.tokens],
    }


def _by_text(tokenizer: Tokenizer, token: Token) -> dict[str, float]:
    """The most likely tokens by their texts, and, as in OpenAI's answers, the one that was chosen."""
    likely: Sequence[tuple[int, float]] = (*token.top, (token.id, token.logprob))
    found: dict[str, float] = {}
    for id, logprob in likely:
        found.setdefault(_text(tokenizer, id), finite(logprob))
    return found


def _token(tokenizer: Tokenizer, id: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(tokenizer, id)
    return {"token": _text(tokenizer, id), "logprob": finite(logprob), "bytes": list(data)}


def _text(tokenizer: Tokenizer, id: int) -> str:
    """A token's text; of one that is no whole characters, its bytes, as OpenAI writes them."""
    data = token_bytes(tokenizer, id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
