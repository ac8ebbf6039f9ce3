"""Which model a run trains, and with which vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

from llama_jax.config import LlamaConfig, presets
from llama_jax.errors import ConfigError

from .checks import one_of


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model is trained.

    Attributes:
      preset: a name of `llama_jax.presets`, in any case; the fields below change it.
      init_from: a checkpoint (a path or a known name) whose weights and shape training starts from.
      vocab_size and the rest: as in `LlamaConfig`. The vocabulary is the tokenizer's unless given.
    """

    preset: str = ""
    init_from: str = ""
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    rms_norm_eps: float | None = None
    rope_theta: float | None = None
    tie_word_embeddings: bool | None = None

    def __post_init__(self) -> None:
        if self.preset:
            one_of("model.preset", self.preset.lower(), [name.lower() for name in vars(presets)])
        if self.init_from and (self.preset or self.changes):
            raise ConfigError(
                f"model.init_from is {self.init_from!r}, which decides the shape: drop "
                f"model.{next(iter(self.changes), 'preset')}"
            )

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that were given."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in fields.items() if v is not None and k not in ("preset", "init_from")}

    def build(self, vocab_size: int | None = None) -> LlamaConfig:
        """The model's configuration; `vocab_size` is the tokenizer's, where there is one by now.

        Raises:
          ConfigError: for a shape that cannot work, or a vocabulary smaller than the tokenizer's.
        """
        by_name = {name.lower(): value for name, value in vars(presets).items()}
        changes = dict(self.changes)
        if vocab_size is not None:
            changes.setdefault("vocab_size", vocab_size)
            if changes["vocab_size"] != vocab_size:
                raise ConfigError(
                    f"model.vocab_size is {changes['vocab_size']}; the tokenizer has {vocab_size} tokens: "
                    "leave it out, or give that"
                )
        try:
            if self.preset:
                return by_name[self.preset.lower()].replace(**changes)
            return LlamaConfig(**changes)
        except ConfigError as error:
            raise ConfigError(f"model: {error}") from None


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which vocabulary.

    Attributes:
      path: a tokenizer file, a model's folder, or a known model's name.
      vocab_size: without `path`, a SentencePiece BPE of this size is trained on the run's own text.
      max_bytes: how much of the text it is trained on.
    """

    path: str = ""
    vocab_size: int = 0
    max_bytes: int = 20_000_000

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.vocab_size):
            raise ConfigError(
                "tokenizer: give either tokenizer.path (a file, a folder or a known model) or "
                "tokenizer.vocab_size (to train one on the run's text)"
            )
        if self.vocab_size < 0 or self.max_bytes < 1:
            raise ConfigError("tokenizer.vocab_size and tokenizer.max_bytes must be above 0")
