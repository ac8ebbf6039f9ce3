"""`[model]`: the architecture, or a checkpoint to start from."""

from __future__ import annotations

import dataclasses
from typing import Any

from llama_jax.config import LlamaConfig, presets
from llama_jax.errors import ConfigError

from .checks import check_one_of


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model to train.

    Attributes:
      preset: a name in `llama_jax.presets`, case-insensitive; the fields below override its values.
      init_from: a checkpoint (a path or a known name) with the initial weights and the architecture.
      vocab_size and the rest: as in `LlamaConfig`; vocab_size defaults to the tokenizer's.

    Raises:
      ConfigError: for an unknown preset, or architecture settings beside init_from.
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
            check_one_of("model.preset", self.preset.lower(), [name.lower() for name in vars(presets)])
        if self.init_from and (self.preset or self.overrides):
            raise ConfigError(
                f"model.init_from is {self.init_from!r}, which determines the architecture; remove "
                f"model.{next(iter(self.overrides), 'preset')}"
            )

    @property
    def overrides(self) -> dict[str, Any]:
        """The architecture fields that are set."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in fields.items() if v is not None and k not in ("preset", "init_from")}

    def build(self, vocab_size: int | None = None) -> LlamaConfig:
        """Makes the model's configuration.

        Args:
          vocab_size: the tokenizer's, if it is known yet.

        Raises:
          ConfigError: for an invalid architecture, or a vocabulary of another size than the tokenizer's.
        """
        by_name = {name.lower(): value for name, value in vars(presets).items()}
        overrides = dict(self.overrides)
        if vocab_size is not None:
            overrides.setdefault("vocab_size", vocab_size)
            if overrides["vocab_size"] != vocab_size:
                raise ConfigError(
                    f"model.vocab_size is {overrides['vocab_size']}; the tokenizer has {vocab_size} tokens: "
                    "leave it out, or set it to that"
                )
        try:
            if self.preset:
                return by_name[self.preset.lower()].replace(**overrides)
            return LlamaConfig(**overrides)
        except ConfigError as error:
            raise ConfigError(f"model: {error}") from None
