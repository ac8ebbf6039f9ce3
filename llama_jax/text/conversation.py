"""A conversation with a model: questions and answers in text, where each turn runs only what is new."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Unpack

from llama_jax.chat import ChatTemplate, chat_template, encode_chat
from llama_jax.decoding import arguments
from llama_jax.decoding.session import Session
from llama_jax.errors import InputError
from llama_jax.text.model import Model, Settings
from llama_jax.text.stop_strings import StopStrings


class Conversation:
    """Questions and answers, with the cache kept between them.

    Each turn renders the whole conversation, and the session runs those of its tokens that its cache does
    not hold yet: usually the end of the last answer and the new question. The answer is the same as if
    all of it had been run.

    Nothing is forgotten in silence. A turn that the model's context has no room for is refused, and an
    answer that reaches the end of the context ends there.

    Args:
      model: the model that answers.
      system: a system prompt.
      template: `llama-2`, `chatml`, the path of a file, or a `ChatTemplate`; see `chat_template`. The
        model's own if None.
      cache_dtype: hold keys and values in float32, bfloat16, float16 or int8, as for `generate`.

    Attributes:
      system: the system prompt, or None; a new one counts from the next turn on.
      session: what runs the model; `session.reused` tells how much of the last prompt was not run again.
      prompt_tokens: length of the last prompt.
      finish_reason: how the last answer ended: `stop` (by the model, or at a stop string), `length` (at
        `max_new_tokens`, or at the end of the context), or None (it was interrupted, or there is none).

    Raises:
      TokenizerError: for a template that is not there.
      InputError: for a dtype that no cache has.
    """

    def __init__(
        self,
        model: Model,
        system: str | None = None,
        template: str | Path | ChatTemplate | None = None,
        *,
        cache_dtype: str | None = None,
    ):
        if not isinstance(template, ChatTemplate):
            template = chat_template(model.tokenizer, template)
        self.model = model
        self.template = template
        self.system = system
        self.session = Session(model.config, model.params, cache_dtype=cache_dtype)
        self.prompt_tokens = 0
        self.finish_reason: str | None = None
        self._turns: list[dict[str, str]] = []
        self._answer: Generator[str, None, None] | None = None

    @property
    def messages(self) -> list[dict[str, str]]:
        """What has been said, as messages with a role and a content; the system prompt comes first."""
        return [dict(message) for message in self._with_system(self._turns)]

    def say(
        self,
        text: str,
        *,
        max_new_tokens: int = 512,
        stop_strings: str | Sequence[str] = (),
        **settings: Unpack[Settings],
    ) -> Generator[str, None, None]:
        """Says something to the model, and returns its answer as it comes.

        The turn becomes part of the conversation when the answer ends. If it is interrupted (closed, by
        Ctrl-C, by an error) the answer is what had been yielded until then, and if that is nothing, the
        question is taken back as well. To say the next thing closes the answer before it.

        Args:
          text: the user's message.
          max_new_tokens: of the answer, at most; in any case no more than the context has room for.
          stop_strings: the answer ends before the first of these; see `StopStrings`.
          **settings: how to choose each token, see `Settings`: `temperature=0.8, top_p=0.95, seed=1`.

        Returns:
          The answer in pieces. Closing it stops the answer.

        Raises:
          InputError: at the call, with the conversation as it was: for a text with a lone surrogate, a
            setting out of range, a turn that the template refuses, or one that the context has no room for.
          TokenizerError: for a template that does not render.
        """
        self.stop()
        turns = [*self._turns, {"role": "user", "content": text}]
        ids = encode_chat(self.model.tokenizer, self.template, self._with_system(turns))
        context = self.model.config.max_position_embeddings
        if len(ids) >= context:
            raise InputError(
                f"with this turn the conversation has {len(ids)} tokens, and the model's context {context}, "
                "the answer included; say less, take turns back, or begin anew"
            )
        most = arguments.whole_number("max_new_tokens", max_new_tokens)
        sampling, key = self.model.settings(**settings)
        stops = StopStrings(stop_strings)
        self.prompt_tokens = len(ids)
        with self.model.on_mesh():
            steps = self.session.stream(
                ids,
                key,
                sampling,
                max_new_tokens=min(most, context - len(ids)),
                eos_id=self.model.tokenizer.eos_ids,
            )
        self._answer = self._answered(turns, self._pieces(steps, stops))
        return self._answer

    def stop(self) -> None:
        """Stops the answer that is being given, if there is one, as closing it does."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.close()

    def undo(self) -> None:
        """Takes back the last question and its answer.

        Raises:
          InputError: if there is none.
        """
        self.stop()
        if not self._turns:
            raise InputError("there is nothing to take back: the conversation has not begun")
        del self._turns[-2:]

    def reset(self) -> None:
        """Forgets all that was said; the system prompt stays."""
        self.stop()
        self._turns = []

    def _with_system(self, turns: list[dict[str, str]]) -> list[dict[str, str]]:
        return turns if self.system is None else [{"role": "system", "content": self.system}, *turns]

    def _answered(
        self, turns: list[dict[str, str]], pieces: Generator[str, None, None]
    ) -> Generator[str, None, None]:
        """Yields an answer, and makes it part of the conversation however it ends."""
        said: list[str] = []
        self.finish_reason = None
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        finally:
            if said or self.finish_reason is not None:
                self._turns = [*turns, {"role": "assistant", "content": "".join(said)}]

    def _pieces(self, steps: Iterator[int], stops: StopStrings) -> Generator[str, None, None]:
        """Turns tokens into text up to a stop string, and notes how the text ended."""
        # As Meta's code does: an answer is a text of its own, without the space that opens SentencePiece's.
        decoder = self.model.tokenizer.stream()
        token = None
        while (following := self._next(steps)) is not None:
            token = following
            text, stopped = stops.push(decoder.push(token))
            if text:
                yield text
            if stopped:
                self.finish_reason = "stop"
                return
        text, stopped = stops.push(decoder.flush())
        if text := text + stops.flush():
            yield text
        self.finish_reason = "stop" if stopped or token in self.model.tokenizer.eos_ids else "length"

    def _next(self, steps: Iterator[int]) -> int | None:
        with self.model.on_mesh():
            return next(steps, None)
