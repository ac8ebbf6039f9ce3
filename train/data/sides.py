"""Encodes one side of an example: token ids, and a mask of those that are trained on.

Plain text is encoded as `generate` encodes its prompt, and ends with EOS; conversations as `encode_turns`
does, or where a template renders earlier turns otherwise as `encode_each_turn` does, each turn as an example
of its own. A classifier's input gets no EOS, as in Hugging Face.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llama_jax.chat import (
    ChatTemplate,
    PromptDiffersError,
    TurnsDifferError,
    encode_chat,
    encode_each_turn,
    encode_turns,
)
from llama_jax.errors import DataError, InputError

from ..config.objective import PAIR_OBJECTIVES, Objective
from .conversations import Conversation
from .encode import Encoder
from .formats import PlainText, Side, Tokens

Encoded = tuple[list[int], list[int]]

_MARKER = "\ue000"  # private use: no vocabulary merges it with other text

# What is said of examples, once, beside their number.
TURNS_APART = (
    "the chat template renders earlier turns otherwise once others follow, so each of the assistant's turns "
    "is an example of its own, after the prompt of generate"
)
PROMPT_DIFFERS = (
    "the chat template, or a token across the border, begins an answer otherwise than the prompt of generate "
    "ends; it is learned from the first token that differs"
)
BEGINS_WITH_ANSWER = "the conversation begins with the assistant; that turn is context and is not learned"
NO_TOOLS = "the chat template does not write `tools`; they are left out"


@dataclasses.dataclass(frozen=True)
class SideEncoder:
    """Encodes the sides of examples.

    Attributes:
      encode: the tokenizer's encoder.
      template: for conversations, or None.
      objective: the run's.
      seq_len: tokens per row.
    """

    encode: Encoder
    template: ChatTemplate | None
    objective: Objective
    seq_len: int

    def __call__(self, side: Side) -> tuple[list[Encoded], list[str]]:
        """Returns the ids and the mask of each sequence of one side, and notes on it.

        Raises:
          DataError: for a conversation without a template.
          InputError: if it cannot be trained on.
          TokenizerError: for a template that does not render.
        """
        labeled = self.objective in ("classify", "regress")
        notes: list[str] = []
        if isinstance(side, Tokens):
            if not 0 <= min(side.ids) <= max(side.ids) < self.encode.vocab_size:
                raise InputError(f"input_ids has ids outside the vocabulary of {self.encode.vocab_size}")
            sequences = [(side.ids, side.mask)]
        elif isinstance(side, PlainText):
            sequences = [_plain(self.encode, side, end=not labeled)]
        elif self.template is None:
            raise DataError(
                "the data has chat messages, and the model has no chat template; set data.template to "
                "llama-2, llama-3, mistral, chatml or a Jinja file"
            )
        elif labeled:
            tokenizer = self.encode.tokenizer
            sequences = [(encode_chat(tokenizer, self.template, side.messages, False, **side.variables), [])]
        else:
            sequences, notes = self._turns(self.template, side)
        if isinstance(side, Conversation) and "tools" in side.variables and self.template is not None:
            notes += [NO_TOOLS] * ("tools" not in self.template.source)
        if labeled:
            sequences = [(ids, [0] * (len(ids) - 1) + [1] * bool(ids)) for ids, _ in sequences]
        return sequences, notes

    def _turns(self, template: ChatTemplate, side: Conversation) -> tuple[list[Encoded], list[str]]:
        """Encodes a conversation in one sequence, or one for each turn, with what was not as it should be."""
        begins = side.first == 0 and side.messages[0]["role"] == "assistant"
        notes = [BEGINS_WITH_ANSWER] if begins else []
        while True:
            arguments: dict[str, Any] = {
                "first": side.first,
                "max_prompt": self.seq_len,
                "exact": PROMPT_DIFFERS not in notes,
                **side.variables,
            }
            try:
                if TURNS_APART in notes:
                    return encode_each_turn(
                        self.encode.tokenizer, template, side.messages, **arguments
                    ), notes
                return [encode_turns(self.encode.tokenizer, template, side.messages, **arguments)], notes
            except TurnsDifferError:
                if self.objective in (*PAIR_OBJECTIVES, "kto"):
                    raise
                notes.append(TURNS_APART)
            except PromptDiffersError:
                notes.append(PROMPT_DIFFERS)


def _plain(encode: Encoder, side: PlainText, *, end: bool) -> tuple[list[int], list[int]]:
    """Returns ids that start with exactly those of the prompt, and a mask of the rest."""
    prompt = encode.ids(side.prompt, add_bos=None)
    ids = encode.ids(side.prompt + side.answer, add_bos=None)
    if ids[: len(prompt)] != prompt:
        ids = prompt + _encode_continuation(encode, side.answer)
    eos = encode.tokenizer.eos_id
    if end and eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
    mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    mask[:1] = [0]  # the first token is not predicted
    return ids, mask


def _encode_continuation(encode: Encoder, text: str) -> list[int]:
    """Encodes text that continues other text: without the leading space that SentencePiece adds."""
    marker = encode.ids(_MARKER)
    ids = encode.ids(_MARKER + text)
    return ids[len(marker) :] if ids[: len(marker)] == marker else encode.ids(text)
