"""The HTTP application: OpenAI's endpoints, health, metrics and the chat page, on Starlette."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llama_jax.serving import answers
from llama_jax.serving.metrics import Metrics
from llama_jax.serving.protocol import ApiError, read_body
from llama_jax.serving.service import Job, Service

PAGE = Path(__file__).with_name("page.html")
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
BODY_SECONDS = 30
"""For the body of a request to arrive."""

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(service: Service, api_key: str | None = None) -> Starlette:
    """The application.

    Args:
      service: the model and its batcher, whose thread the caller starts and ends.
      api_key: what clients of `/v1` have to send as a bearer token; None is nothing.
    """
    metrics = Metrics(service.batcher)

    def route(path: str, function: Endpoint, method: str = "GET") -> Route:
        """An endpoint with the key, errors in OpenAI's form, and a count of its responses."""

        async def answer(request: Request) -> Response:
            response: Response
            try:
                _check_key(request, api_key)
                response = await function(request)
            except ApiError as error:
                response = JSONResponse(error.body, error.status, error.headers)
            metrics.responses.labels(path, str(response.status_code)).inc()
            return response

        return Route(path, answer, methods=[method])

    async def completions(request: Request) -> Response:
        return await _answer(request, service, metrics, chat=False)

    async def chat_completions(request: Request) -> Response:
        return await _answer(request, service, metrics, chat=True)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        _check_model(request.path_params["name"], service)
        return JSONResponse(_model(service))

    async def health(request: Request) -> Response:
        state = {"status": "stopping" if service.stopping else "ok", "model": service.name}
        return JSONResponse(state, 503 if service.stopping else 200)

    async def metrics_text(request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": _PAGE_POLICY})

    return Starlette(
        routes=[
            route("/v1/completions", completions, "POST"),
            route("/v1/chat/completions", chat_completions, "POST"),
            route("/v1/models", models),
            route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/metrics", metrics_text),
            Route("/", page),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _server_error},
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """A path or method that there is not."""
    status = getattr(error, "status_code", 500)
    message = f"{request.method} {request.url.path}: {getattr(error, 'detail', error)}"
    body = ApiError(status, message, code="not_found" if status == 404 else None).body
    return JSONResponse(body, status, getattr(error, "headers", None))


async def _server_error(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(500, "internal error; see the server's log", kind="server_error").body, 500)


def _check_key(request: Request, api_key: str | None) -> None:
    if api_key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
        raise ApiError(
            401,
            "the API key is missing or wrong; send it as Authorization: Bearer KEY",
            kind="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "llama_jax",
        "max_model_len": service.batcher.max_length,
    }


def _check_model(name: Any, service: Service) -> None:
    if not isinstance(name, str):
        raise ApiError(400, f"model is {repr(name)[:40]}; it must be {service.name!r}", param="model")
    if name != service.name:
        raise ApiError(
            404,
            f"the model {name[:80]!r} does not exist; this server has {service.name!r}",
            param="model",
            code="model_not_found",
        )


async def _read(request: Request, limit: int) -> Any:
    """The body's JSON.

    Raises:
      ApiError: if it is too large, too slow, of another type, or malformed.
    """
    # No page of another site may send this type without asking first, which nobody answers.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body must be JSON: send Content-Type: application/json")
    data, close = bytearray(), {"Connection": "close"}
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                data += part
                if len(data) > limit:
                    raise ApiError(413, f"the body is larger than {limit} bytes", headers=close)
    except TimeoutError:
        message = f"the body did not come within {BODY_SECONDS} s"
        raise ApiError(408, message, kind="timeout_error", code="timeout", headers=close) from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None


async def _answer(request: Request, service: Service, metrics: Metrics, *, chat: bool) -> Response:
    """A whole answer, or a stream of its pieces."""
    start = time.monotonic()
    try:
        content = await _read(request, service.limits.body_bytes)
    except ClientDisconnect:
        return Response(status_code=499)
    body = read_body(content, chat=chat, max_n=service.limits.choices, max_top=service.batcher.top_logprobs)
    _check_model(content.get("model", service.name), service)
    job = await run_in_threadpool(service.submit, body, chat=chat)
    news = asyncio.Event()
    loop = asyncio.get_running_loop()
    for choice in job.choices:
        choice.handle.listen(lambda: loop.call_soon_threadsafe(news.set))

    closed = False

    def close() -> None:
        nonlocal closed
        if closed:
            return
        closed = True
        job.cancel()
        metrics.request.observe(time.monotonic() - start)
        for choice in job.choices:
            if choice.handle.generated:
                metrics.first_token.observe(choice.handle.seconds_to_first)

    if body.stream:
        return _EventStream(_events(service, job, news), close)
    try:
        if await _until_done_or_disconnected(request, job, news):
            return JSONResponse(answers.whole(service, job))
        return Response(status_code=499)  # nobody reads it
    finally:
        close()


class _EventStream(StreamingResponse):
    """Server-sent events; `close` is called however they end."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _until_done_or_disconnected(request: Request, job: Job, news: asyncio.Event) -> bool:
    """Waits for all rows to end; False if the client leaves before."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def done() -> None:
        while True:
            news.clear()
            if all(choice.handle.done for choice in job.choices):
                return
            await news.wait()

    tasks = [asyncio.ensure_future(done()), asyncio.ensure_future(disconnected())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def _events(service: Service, job: Job, news: asyncio.Event) -> AsyncIterator[bytes]:
    """The server-sent events of a job; a reader that is slow gets larger pieces, and holds up nobody."""
    try:
        for choice in job.choices:
            if (begin := answers.first_chunk(service, job, choice)) is not None:
                yield _event(begin)
        running = list(job.choices)
        while running:
            news.clear()
            for choice in list(running):
                ended = choice.handle.done  # before the piece is taken, which then is the last
                piece = choice.text.take(ended=ended)
                if piece.text or (piece.tokens and job.body.top_logprobs is not None):
                    yield _event(answers.chunk(service, job, choice, piece))
                if ended:
                    yield _event(answers.last_chunk(service, job, choice))
                    running.remove(choice)
            if running:
                await news.wait()
        if job.body.include_usage:
            yield _event(answers.usage_chunk(service, job))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)
        yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, allow_nan=False).encode() + b"\n\n"
