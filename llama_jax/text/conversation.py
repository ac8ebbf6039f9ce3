"""A multi-turn conversation with a model that reuses the key/value cache between turns."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from llama_jax.chat import ChatTemplate, chat_template, encode_chat
from llama_jax.decoding import arguments
from llama_jax.decoding.session import Session
from llama_jax.errors import InputError
from llama_jax.text.model import Model
from llama_jax.text.settings import TextSettings, take_grammar
from llama_jax.text.stop_strings import StopStrings, split_stop_strings


class Conversation:
    """A multi-turn chat whose key/value cache is kept between turns.

    Each turn renders the whole conversation, and the session prefills only the tokens after the longest
    cached prefix: usually the end of the last answer and the new user message. The answer equals that of a
    prefill of the whole conversation.

    On a mesh over several processes each says the same, and stops an answer at the same piece.

    The conversation is never truncated: a turn that does not fit in the model's context is an error, and an
    answer that reaches the end of the context ends there.

    Args:
      model: the model.
      system: the system prompt, or None.
      template: `llama-2`, `llama-3`, `mistral`, `chatml`, the path of a template file, or a `ChatTemplate`;
        see `chat_template`. None is the model's own template.
      cache_dtype: dtype of the key/value cache: float32, bfloat16, float16, int8 or fp8, as for `generate`.
      **variables: the template's other variables, such as `tools`; see `encode_chat`.

    Attributes:
      system: the system prompt, or None; a change takes effect at the next turn.
      variables: the template's other variables; so does a change of these.
      session: the decoding session; `session.reused` is the number of cached tokens of the last prompt.
      prompt_tokens: number of tokens of the last prompt.
      finish_reason: how the last answer ended: `stop` (EOS token or stop string), `length`
        (`max_new_tokens` or the end of the context), or None (interrupted, or no answer yet).

    Raises:
      TokenizerError: if there is no template.
      InputError: for an unsupported cache dtype.
    """

    def __init__(
        self,
        model: Model,
        system: str | None = None,
        template: str | Path | ChatTemplate | None = None,
        *,
        cache_dtype: str | None = None,
        **variables: Any,
    ):
        if not isinstance(template, ChatTemplate):
            template = chat_template(model.tokenizer, template)
        self.model = model
        self.template = template
        self.system = system
        self.variables = variables
        self.session = Session(model.config, model.params, cache_dtype=cache_dtype)
        self.prompt_tokens = 0
        self.finish_reason: str | None = None
        self._turns: list[dict[str, Any]] = []
        self._answer: Generator[str, None, None] | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The message history as dicts with `role` and `content`, the system prompt first."""
        return [dict(message) for message in self._with_system(self._turns)]

    def say(
        self,
        text: str | Mapping[str, Any],
        *,
        max_new_tokens: int = 512,
        stop_strings: str | Sequence[str] = (),
        **settings: Unpack[TextSettings],
    ) -> Generator[str, None, None]:
        """Sends a user message and streams the model's answer.

        The turn is added to the history when the answer ends. If it is interrupted (closed, Ctrl-C, an error)
        the history gets the text yielded so far; if there is none, the user message is dropped too. The next
        call closes an answer that is still open.

        Args:
          text: the user message; or a message of any role, such as a tool's result.
          max_new_tokens: maximum length of the answer in tokens; the end of the context also limits it.
          stop_strings: the answer ends before the first of these; see `StopStrings`.
          **settings: as for `Model.generate`: `temperature=0.8, top_p=0.95, seed=1, json_schema=...`.

        Returns:
          A generator of pieces of the answer. Closing it stops the answer.

        Raises:
          InputError: at the call, with the history unchanged: for a text with a lone surrogate, a setting out
            of range, a turn that the template rejects, or one that does not fit in the context.
          TokenizerError: if the template does not render.
        """
        self.stop()
        message = dict(text) if isinstance(text, Mapping) else {"role": "user", "content": text}
        turns = [*self._turns, message]
        ids = encode_chat(self.model.tokenizer, self.template, self._with_system(turns), **self.variables)
        context = self.model.config.max_position_embeddings
        if len(ids) >= context:
            raise InputError(
                f"with this turn the conversation has {len(ids)} tokens and leaves no room for an answer in "
                f"the model's context of {context}; shorten the message, undo turns, or reset"
            )
        limit = arguments.check_int("max_new_tokens", max_new_tokens)
        grammar, rest = take_grammar(self.model.tokenizer, settings)
        sampling, key = self.model.sampling(**rest)
        self._end_ids, stop_strings = split_stop_strings(self.model.tokenizer, stop_strings)
        stops = StopStrings(stop_strings)
        self.prompt_tokens = len(ids)
        with self.model.on_mesh():
            steps = self.session.stream(
                ids,
                key,
                sampling,
                max_new_tokens=min(limit, context - len(ids)),
                eos_id=self._end_ids,
                grammar=grammar,
            )
        self._answer = self._record(turns, self._decode(steps, stops))
        return self._answer

    def stop(self) -> None:
        """Stops the current answer, if there is one, as closing it does."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()

    def undo(self) -> None:
        """Removes the last user message and its answer from the history.

        Raises:
          InputError: if the history is empty.
        """
        self.stop()
        if not self._turns:
            raise InputError("there is nothing to undo: the conversation is empty")
        del self._turns[-2:]

    def reset(self) -> None:
        """Clears the history; the system prompt is kept."""
        self.stop()
        self._turns = []

    def _with_system(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return turns if self.system is None else [{"role": "system", "content": self.system}, *turns]

    def _record(
        self, turns: list[dict[str, Any]], pieces: Generator[str, None, None]
    ) -> Generator[str, None, None]:
        """Yields an answer and adds it to the history, even if it is interrupted."""
        answer: list[str] = []
        self.finish_reason = None
        try:
            for piece in pieces:
                answer.append(piece)
                yield piece
        finally:
            if answer or self.finish_reason is not None:
                self._turns = [*turns, {"role": "assistant", "content": "".join(answer)}]

    def _decode(self, steps: Iterator[int], stops: StopStrings) -> Generator[str, None, None]:
        """Detokenizes up to a stop string, and sets `finish_reason`."""
        # As in Meta's code the answer is decoded by itself, so SentencePiece drops its leading space.
        decoder = self.model.tokenizer.stream()
        token = None
        while (next_token := self._next(steps)) is not None:
            token = next_token
            text, stopped = stops.push(decoder.push(token))
            if text:
                yield text
            if stopped:
                self.finish_reason = "stop"
                return
        text, stopped = stops.push(decoder.flush())
        if text := text + stops.flush():
            yield text
        self.finish_reason = "stop" if stopped or token in self._end_ids else "length"

    def _next(self, steps: Iterator[int]) -> int | None:
        with self.model.on_mesh():
            return next(steps, None)
