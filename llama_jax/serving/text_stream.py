"""The text of a request as its tokens come: whole characters, up to a stop string, with log-probabilities."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from llama_jax.serving.requests import Token
from llama_jax.text.stop_strings import StopStrings
from llama_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text, and the tokens that begin in it.

    Attributes:
      text: what is new.
      tokens: each with the place in the whole text where it begins, in characters.
    """

    text: str
    tokens: tuple[tuple[Token, int], ...] = ()


class TextStream:
    """What the reader of a request gets. `follow` is called by the batcher, `take` by the reader.

    A character is held back until all of its bytes are there, and text that may be the beginning of a stop
    string until that is decided. Tokens of a stop string, and the end token, are not part of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: str | Sequence[str] = (),
        end_ids: Sequence[int] = (),
        prompt: Sequence[int] = (),
    ) -> None:
        """Begins an empty text.

        Args:
          tokenizer: the tokenizer.
          stop_strings: the text ends before the first of them.
          end_ids: the end-of-sequence ids.
          prompt: the ids that the text continues, where its first space counts; none for a text by itself.
        """
        self._decoder = tokenizer.stream()
        self._decoder.extend(prompt)
        self._stops = StopStrings(stop_strings)
        self._end_ids = frozenset(end_ids)
        self._pieces: collections.deque[Piece] = collections.deque()  # between two threads
        self._held: list[tuple[Token, int]] = []
        self._decoded = 0  # characters
        self._released = 0

    def follow(self, token: Token) -> bool:
        """Adds a token; whether it completes a stop string (`Request.follow`)."""
        text = self._decoder.push(token.id)
        if token.id not in self._end_ids:
            self._held.append((token, self._decoded))
        self._decoded += len(text)
        visible, stopped = self._stops.push(text)
        self._release(visible)
        return stopped

    def take(self, *, ended: bool = False) -> Piece:
        """All that is new since the last call; at the `end` of the request, also what was held back."""
        if ended:
            text = self._decoder.flush()
            self._decoded += len(text)
            visible, stopped = self._stops.push(text)
            was_stopped = stopped or self._stops.stopped
            self._release(visible + self._stops.flush(), all_tokens=not was_stopped)
        pieces = [self._pieces.popleft() for _ in range(len(self._pieces))]
        return Piece(
            "".join(piece.text for piece in pieces),
            tuple(token for piece in pieces for token in piece.tokens),
        )

    def _release(self, text: str, *, all_tokens: bool = False) -> None:
        """Adds a piece: of the tokens those that begin before its end, or where nothing is held back, all."""
        self._released += len(text)
        everything = all_tokens or self._released == self._decoded
        ready = [entry for entry in self._held if everything or entry[1] < self._released]
        if text or ready:
            self._held = self._held[len(ready) :]
            self._pieces.append(Piece(text, tuple(ready)))


def token_bytes(tokenizer: Tokenizer, id: int) -> bytes:
    """The bytes of a token; of a control token, its name."""
    table = getattr(tokenizer, "table", None)
    return table.pieces[id] if table is not None else tokenizer.piece(id).encode()
