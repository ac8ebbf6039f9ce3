"""`[model]`: the architecture, or a checkpoint to start from."""

from __future__ import annotations

import dataclasses
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.model_sizes import presets

from .checks import check_one_of
from .rope_scaling import RopeScalingConfig, check_reach

_CONTEXT = ("max_position_embeddings", "rope_theta", "rope_scaling")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model to train.

    Attributes:
      preset: a name in `llama_jax.presets`, case-insensitive; the fields below override its values.
      init_from: a checkpoint (a path or a known name) with the initial weights and the architecture.
      vocab_size: V; by default the tokenizer's, or that of init_from. A larger value pads the embedding with
        rows that no token has, for instance to a multiple of a mesh axis.
      max_position_embeddings: the context in tokens, at least `train.seq_len`. With rope_scaling it is by
        default the scaling factor times the original context.
      rope_theta: base of the rotary frequencies (arXiv 2104.09864).
      rope_scaling: how rotary frequencies are scaled for a longer context, a table: `--help
        model.rope_scaling.factor`, ...
      hidden_size and the rest: as in `LlamaConfig`.

    Beside init_from, max_position_embeddings, rope_theta and rope_scaling extend the pretrained context.

    Raises:
      ConfigError: for an unknown preset, or other architecture settings than these and vocab_size beside
        init_from.
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
    rope_scaling: RopeScalingConfig | None = None
    tie_word_embeddings: bool | None = None
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool | None = None
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    rope_layers: tuple[bool, ...] | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None

    def __post_init__(self) -> None:
        if self.preset:
            check_one_of("model.preset", self.preset.lower(), [name.lower() for name in vars(presets)])
        others = [name for name in self.overrides if name not in ("vocab_size", *_CONTEXT)]
        if self.init_from and (self.preset or others):
            raise ConfigError(
                f"model.init_from is {self.init_from!r}, which determines the architecture; remove "
                f"model.{next(iter(others), 'preset')}"
            )

        if self.rope_scaling is not None and self.rope_scaling.rope_type is None and not self.init_from:
            raise ConfigError(
                "model.rope_scaling.rope_type is missing; it must be one of linear, ntk, yarn, llama3"
            )

    @property
    def overrides(self) -> dict[str, Any]:
        """The architecture fields that are set."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v for k, v in fields.items() if v is not None and k not in ("preset", "init_from")}

    @property
    def extends_context(self) -> bool:
        """Whether the rotary settings or the context of `init_from` are changed."""
        return bool(self.init_from) and any(getattr(self, name) is not None for name in _CONTEXT)

    def build(self, vocab_size: int | None = None) -> LlamaConfig:
        """Makes the model's configuration.

        Args:
          vocab_size: the tokenizer's, if it is known yet.

        Raises:
          ConfigError: for an invalid architecture, or a vocabulary smaller than the tokenizer's.
        """
        by_name = {name.lower(): value for name, value in vars(presets).items()}
        overrides = {name: value for name, value in self.overrides.items() if name not in _CONTEXT}
        if vocab_size is not None:
            overrides.setdefault("vocab_size", vocab_size)
            if overrides["vocab_size"] < vocab_size:
                raise ConfigError(
                    f"model.vocab_size is {overrides['vocab_size']}; the tokenizer has {vocab_size} tokens: "
                    "leave it out, or give at least that"
                )
        try:
            base = by_name[self.preset.lower()].replace(**overrides) if self.preset else None
            # Without a preset a given context is that of the scaled model.
            is_known = base is not None or self.max_position_embeddings is None
            return self._with_context(LlamaConfig(**overrides) if base is None else base, is_known)
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith("model.") else f"model: {text}") from None

    def extended(self, base: LlamaConfig) -> LlamaConfig:
        """The configuration of `init_from`, with the rotary settings and the context that are set.

        Raises:
          ConfigError: if they are incomplete, invalid, or contradict each other.
        """
        return self._with_context(base, True)

    def _with_context(self, base: LlamaConfig, is_known: bool) -> LlamaConfig:
        changes = {name: getattr(self, name) for name in _CONTEXT if getattr(self, name) is not None}
        if self.rope_scaling is not None:
            context = base.max_position_embeddings if is_known else None
            scaling, reach = self.rope_scaling.resolve(base, self.max_position_embeddings, context=context)
            changes |= {"rope_scaling": scaling, "max_position_embeddings": reach}
        if not changes:
            return base
        config = base.replace(**changes)
        check_reach(config)
        return config
