"""The tokenizer of a model that has none: its arrays work, its text methods say what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from llama_jax.errors import MissingTokenizerError
from llama_jax.tokenizer.base import StreamDecoder


class MissingTokenizer:
    """A `Tokenizer` without a vocabulary.

    Attributes:
      vocab_size: that of the model.
      problem: what is missing, and what to do.
    """

    def __init__(self, vocab_size: int, problem: str):
        self.vocab_size = vocab_size
        self.problem = problem
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self.unk_id: int | None = None
        self.pad_id: int | None = None
        self.eos_ids: tuple[int, ...] = ()
        self.add_bos = False
        self.special_tokens: Mapping[str, int] = {}
        self.chat_template: str | None = None

    def _raise(self) -> NoReturn:
        raise MissingTokenizerError(self.problem)

    def encode(self, text: str, **settings: Any) -> list[int]:
        """Raises MissingTokenizerError."""
        self._raise()

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Raises MissingTokenizerError."""
        self._raise()

    def piece(self, id: int) -> str:
        """Raises MissingTokenizerError."""
        self._raise()

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Raises MissingTokenizerError."""
        self._raise()
