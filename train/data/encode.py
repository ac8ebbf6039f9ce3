"""Text to token ids: BOS, the text, EOS."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any

import numpy as np

from llama_jax.errors import DataError, TokenizerError
from llama_jax.tokenizer import Tokenizer, load_tokenizer

_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>")  # end a document; other end tokens may end a turn
_PROBE = "def f(x):\n\treturn  x + 1234  # caf\u00e9 \u4f60\u597d \U0001f999\r\n"


@dataclasses.dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
      ids: int32 [n]; empty for an empty text.
      nbytes: UTF-8 length of its text.
    """

    ids: np.ndarray
    nbytes: int


class Encoder:
    """Encodes documents; picklable with every tokenizer.

    Attributes:
      vocab_size: number of ids.
      parse_special: whether control tokens spelled in a text become their ids, as Hugging Face's tokenizers
        do; otherwise they are ordinary text.
    """

    def __init__(self, tokenizer: Tokenizer, parse_special: bool = True):
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.parse_special = parse_special
        self._bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def __call__(self, text: str) -> np.ndarray:
        """Returns int32 [n]: BOS, the ids of `text`, EOS.

        BOS or EOS is omitted if the vocabulary has none, or the text spells it, or a separator, there.

        Raises:
          TokenizerError: for text with a lone surrogate.
        """
        ids = self.ids(text)
        bos = [] if ids[:1] == self._bos else self._bos
        eos = [] if ids and ids[-1] in {*self._eos, *self.separators} else self._eos
        return np.array([*bos, *ids, *eos], np.int32)

    def ids(self, text: str, *, add_bos: bool | None = False) -> list[int]:
        """Returns the ids of a text, without EOS; `add_bos` is the tokenizer's, None its default."""
        return self._tokenizer.encode(text, add_bos=add_bos, add_eos=False, parse_special=self.parse_special)

    @functools.cached_property
    def separators(self) -> tuple[int, ...]:
        """Ids of the control tokens after which another document begins within a text."""
        special = self._tokenizer.special_tokens
        return tuple(special[name] for name in _SEPARATORS if name in special)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return self._tokenizer

    def _probe(self) -> list[int]:
        return _encode_probe(self._tokenizer)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary without the model's padding, of a probe's ids, and of `parse_special`."""
        tokenizer = getattr(self._tokenizer, "fitted_from", None) or self._tokenizer
        digest = hashlib.blake2b(b"" if self.parse_special else b"text", digest_size=16)
        for part in (tokenizer.vocab_size, self._bos, self._eos, _encode_probe(tokenizer)):
            digest.update(f"{part}\n".encode())
        for token in range(tokenizer.vocab_size):
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


def _encode_probe(tokenizer: Tokenizer) -> list[int]:
    control_tokens = "".join(list(tokenizer.special_tokens)[:64])
    return tokenizer.encode(_PROBE + control_tokens, add_bos=False)
