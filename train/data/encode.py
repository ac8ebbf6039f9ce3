"""Text to token ids: BOS, the text, EOS."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np

from llama_jax.errors import DataError, TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer

_PROBE = "def f(x):\n\treturn  x + 1234  # caf\u00e9 \u4f60\u597d \U0001f999\r\n"


class Encoder:
    """Encodes documents; it can be pickled, whatever the tokenizer.

    Control tokens spelled in a document are ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self._first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._last = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def __call__(self, text: str) -> np.ndarray:
        """Returns int32 [n]: BOS, the ids of `text`, EOS; without those that the vocabulary lacks.

        Raises:
          TokenizerError: for text with a lone surrogate.
        """
        ids = self._tokenizer.encode(text, add_bos=False)
        return np.array([*self._first, *ids, *self._last], np.int32)

    @property
    def tokenizer(self) -> Tokenizer:
        """What it encodes with."""
        return self._tokenizer

    def _probe(self) -> list[int]:
        spelled = "".join(list(self._tokenizer.special_tokens)[:64])
        return self._tokenizer.encode(_PROBE + spelled, add_bos=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary and of how it splits a probe."""
        tokenizer = self._tokenizer
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.vocab_size, self._first, self._last, self._probe()):
            digest.update(f"{part}\n".encode())
        for token in range(self.vocab_size):
            digest.update(tokenizer.piece(token).encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "probe": self._probe()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The tokenizers library drops its switch for control tokens when it is pickled.
        probe = state.pop("probe")
        self.__dict__.update(state)
        origin = getattr(self._tokenizer, "origin", "")
        if self._probe() != probe:
            try:
                self._tokenizer = load_tokenizer(origin)
            except TokenizerError as error:
                raise DataError(f"a worker process cannot load the tokenizer: {error}") from None
            if self._probe() != probe:
                raise DataError(f"{origin} changed while the run was using it; put it back as it was")
