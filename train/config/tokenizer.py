"""`[tokenizer]`: where the vocabulary comes from."""

from __future__ import annotations

import dataclasses

from llama_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """An existing tokenizer, or one that is trained on the run's own text.

    Attributes:
      path: a tokenizer file, a model's directory, or a known model's name.
      vocab_size: without `path`, a SentencePiece BPE of this size is trained on the run's own text.
      max_bytes: how many bytes of the text it is trained on.

    Raises:
      ConfigError: if not exactly one of path and vocab_size is set, or a size is not positive.
    """

    path: str = ""
    vocab_size: int = 0
    max_bytes: int = 20_000_000

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.vocab_size):
            raise ConfigError(
                "tokenizer: give either tokenizer.path (a file, a directory or a known model) or "
                "tokenizer.vocab_size (to train one on the run's text)"
            )
        if self.vocab_size < 0 or self.max_bytes < 1:
            raise ConfigError("tokenizer.vocab_size and tokenizer.max_bytes must be above 0")
