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
    """Encodes documents; picklable with every tokenizer.

    Control tokens spelled in a document are ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self._bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def __call__(self, text: str) -> np.ndarray:
        """Returns int32 [n]: BOS, the ids of `text`, EOS; BOS or EOS is omitted if the vocabulary has none.

        Raises:
          TokenizerError: for text with a lone surrogate.
        """
        ids = self._tokenizer.encode(text, add_bos=False)
        return np.array([*self._bos, *ids, *self._eos], np.int32)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self._tokenizer

    def _probe(self) -> list[int]:
        control_tokens = "".join(list(self._tokenizer.special_tokens)[:64])
        return self._tokenizer.encode(_PROBE + control_tokens, add_bos=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary and of the encoding of a probe text."""
        tokenizer = self._tokenizer
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.vocab_size, self._bos, self._eos, self._probe()):
            digest.update(f"{part}\n".encode())
        for token in range(self.vocab_size):
            digest.update(tokenizer.piece(token).encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "probe": self._probe()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pickling a tokenizers.Tokenizer loses its setting for control tokens.
        probe = state.pop("probe")
        self.__dict__.update(state)
        origin = getattr(self._tokenizer, "origin", "")
        if self._probe() != probe:
            try:
                self._tokenizer = load_tokenizer(origin)
            except TokenizerError as error:
                raise DataError(f"a worker process cannot load the tokenizer: {error}") from None
            if self._probe() != probe:
                raise DataError(f"{origin} changed during the run; restore it")
