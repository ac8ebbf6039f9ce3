"""What an endpoint does with a request's body: prompts to rows of the batch, and their texts to an answer."""

from __future__ import annotations

import dataclasses
import time
import uuid
from pathlib import Path
from typing import Any

from llama_jax.chat import ChatTemplate, chat_template, encode_chat
from llama_jax.decoding.constraints import Grammar
from llama_jax.errors import InputError, LlamaJaxError, QueueFullError, TokenizerError
from llama_jax.serving.batcher import Batcher
from llama_jax.serving.protocol import ApiError, Body
from llama_jax.serving.requests import Handle, Request
from llama_jax.serving.text_stream import TextStream
from llama_jax.structured_output.build import grammar
from llama_jax.text.model import Model
from llama_jax.text.stop_strings import split_stop_strings


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
      prompt_tokens: of a prompt; None is the batcher's `max_length` less one.
      new_tokens: of a continuation; None likewise.
      choices: rows of one request: prompts times `n`.
      seconds: from its arrival to its end.
      body_bytes: of its body.
    """

    prompt_tokens: int | None = None
    new_tokens: int | None = None
    choices: int = 16
    seconds: float = 600.0
    body_bytes: int = 4 << 20


@dataclasses.dataclass(frozen=True)
class Choice:
    """One text of an answer: a row of the batch.

    Attributes:
      index: its number in the answer.
      text: the text as it comes.
      handle: of its row.
      before: what the text begins with: the prompt, where `echo` asks for it.
      first: whether it is its prompt's first continuation.
    """

    index: int
    text: TextStream
    handle: Handle
    before: str
    first: bool


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that runs.

    Attributes:
      id: of the answer.
      created: seconds since 1970.
      chat: whether it is a chat, or else completions.
      body: what was asked.
      choices: its texts.
    """

    id: str
    created: int
    chat: bool
    body: Body
    choices: list[Choice]

    def cancel(self) -> None:
        """Ends what still runs."""
        for choice in self.choices:
            if not choice.handle.done:
                choice.handle.cancel()


class Service:
    """A model, its batcher and the limits of requests.

    Attributes:
      model: the model.
      batcher: over its parameters.
      name: what clients call the model.
      limits: of requests.
      template: of chats; None if the model has none.
      stopping: whether the server is about to end: no request is taken.
      started: when it was made, in seconds since 1970.
    """

    def __init__(
        self,
        model: Model,
        batcher: Batcher,
        name: str,
        *,
        limits: Limits | None = None,
        template: str | Path | ChatTemplate | None = None,
    ) -> None:
        """Checks the template, if one is given.

        Raises:
          TokenizerError: if it cannot be read.
        """
        self.model = model
        self.batcher = batcher
        self.name = name
        self.limits = Limits() if limits is None else limits
        self.stopping = False
        self.started = int(time.time())
        self.template: ChatTemplate | None = None
        self._no_template = ""
        try:
            chosen = isinstance(template, ChatTemplate)
            self.template = template if chosen else chat_template(model.tokenizer, template)  # type: ignore[arg-type, assignment]
        except TokenizerError as error:
            if template is not None:
                raise
            self._no_template = str(error)
        model.sampling(seed=0)  # compiles what makes a key

    def submit(self, body: Body, *, chat: bool) -> Job:
        """Tokenizes the prompts and queues their continuations; takes milliseconds.

        Raises:
          ApiError: for a prompt that cannot be read, or is too long; settings that are refused; a full queue.
        """
        if self.stopping:
            raise ApiError(503, "the server is stopping", kind="server_error", headers={"Retry-After": "5"})
        prompts = self._prompts(body, chat)
        if len(prompts) * body.n > self.limits.choices:
            raise ApiError(
                400,
                f"{len(prompts)} prompts times n {body.n} are more than {self.limits.choices} texts; ask "
                "for fewer",
                param="n",
            )
        if body.echo and body.top_logprobs is not None:
            raise ApiError(400, "echo with logprobs is not supported; leave one of them out", param="echo")
        try:
            sampling, key = self.model.sampling(**body.settings)
            end_ids, stops = split_stop_strings(self.model.tokenizer, body.stop)
        except LlamaJaxError as error:
            raise ApiError(400, str(error)) from None
        constraint = self._grammar(body)
        requests, texts, echoes = [], [], []
        for number, prompt in enumerate(prompts):
            limit = self._new_tokens(body, len(prompt))
            echo = ""
            if body.echo:
                given = body.prompts[number]
                echo = given if isinstance(given, str) else self.model.tokenizer.decode(given)
            for index in range(body.n):
                # What fills a schema is a text of its own.
                before = () if chat or constraint is not None else prompt
                text = TextStream(self.model.tokenizer, stops, end_ids, before)
                requests.append(
                    Request(
                        prompt,
                        limit,
                        sampling,
                        end_ids,
                        key,
                        # The continuations of several prompts differ too, should the prompts be equal.
                        index=number * body.n + index,
                        top_logprobs=body.top_logprobs or 0,
                        grammar=constraint,
                        timeout=self.limits.seconds,
                        follow=text.follow,
                    )
                )
                texts.append(text)
                echoes.append(echo)
        try:
            handles = self.batcher.submit_all(requests)
        except QueueFullError as error:
            headers = {"Retry-After": str(error.retry_after)}
            raise ApiError(
                429, str(error), code="queue_full", kind="rate_limit_error", headers=headers
            ) from None
        except InputError as error:
            raise ApiError(400, str(error)) from None
        choices = [
            Choice(index, text, handle, echo, index % body.n == 0)
            for index, (text, handle, echo) in enumerate(zip(texts, handles, echoes, strict=True))
        ]
        prefix = "chatcmpl" if chat else "cmpl"
        return Job(f"{prefix}-{uuid.uuid4().hex}", int(time.time()), chat, body, choices)

    def _grammar(self, body: Body) -> Grammar | None:
        """The grammar of a `response_format`; the last ones are kept."""
        if body.schema is None:
            return None
        try:
            return grammar(self.model.tokenizer, json_schema=body.schema)
        except LlamaJaxError as error:
            raise ApiError(400, f"response_format: {error}", param="response_format") from None

    def _prompts(self, body: Body, chat: bool) -> list[list[int]]:
        """The ids of each prompt."""
        try:
            if chat:
                if self.template is None:
                    raise ApiError(400, self._no_template, param="messages")
                return [encode_chat(self.model.tokenizer, self.template, body.messages)]
            return [
                self.model.encode_prompt(prompt) if isinstance(prompt, str) else self._checked(prompt)
                for prompt in body.prompts
            ]
        except LlamaJaxError as error:
            raise ApiError(400, str(error), param="messages" if chat else "prompt") from None

    def _checked(self, ids: list[int]) -> list[int]:
        size = self.model.config.vocab_size
        if outside := [id for id in ids if not 0 <= id < size]:
            raise ApiError(
                400, f"token id {outside[0]} is outside the vocabulary, of {size} ids", param="prompt"
            )
        return ids

    def _new_tokens(self, body: Body, prompt_tokens: int) -> int:
        """The most new tokens after a prompt.

        Raises:
          ApiError: if the prompt is too long, or `max_tokens` too large.
        """
        room = self.batcher.max_length
        longest = min(self.limits.prompt_tokens or room, room - 1)
        name = "messages" if body.messages else "prompt"
        too_long: dict[str, Any] = {"code": "context_length_exceeded"}
        if prompt_tokens > longest:
            raise ApiError(
                400,
                f"the prompt has {prompt_tokens} tokens, and this server takes up to {longest}; shorten it",
                param=name,
                **too_long,
            )
        most = self.limits.new_tokens or room
        if body.max_tokens is None:
            return min(most, room - prompt_tokens)
        if body.max_tokens > most:
            raise ApiError(
                400,
                f"max_tokens is {body.max_tokens}, and this server generates up to {most}; ask for fewer",
                param="max_tokens",
            )
        if prompt_tokens + body.max_tokens > room:
            raise ApiError(
                400,
                f"the prompt's {prompt_tokens} tokens and max_tokens {body.max_tokens} are more than the "
                f"{room} that this server has room for; shorten one of them",
                param=name,
                **too_long,
            )
        return body.max_tokens


def usage(job: Job) -> dict[str, Any]:
    """OpenAI's `usage`: every prompt counts once."""
    prompt = sum(len(choice.handle.request.tokens) for choice in job.choices if choice.first)
    new = sum(choice.handle.generated for choice in job.choices)
    shared = sum(choice.handle.shared_tokens for choice in job.choices if choice.first)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": shared},
    }
