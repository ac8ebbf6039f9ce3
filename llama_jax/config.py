"""The configuration of a Llama or one of its kin: one frozen, validated dataclass.

Field names are those of Hugging Face's configurations. The letters beside them are defined in
`llama_jax/__init__.py`. The published sizes are in `presets`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

from llama_jax.errors import ConfigError

RopeScalingKind = Literal["linear", "ntk", "yarn", "llama3"]
_MAX_VALUE = 1e6  # far above any value in use, and safe in the powers and logarithms of the scaling rules


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for contexts longer than that of pretraining.

    Attributes:
      kind: `linear` divides every frequency by `factor` (position interpolation, arXiv 2306.15595);
        `ntk` multiplies theta by `factor ** (H / (H - 2))`, which divides the lowest frequency by
        `factor` and does not change the highest; `yarn` interpolates by wavelength and rescales the
        attention logits (arXiv 2309.00071); `llama3` is Llama 3.1's smoothed interpolation.
      factor: the scaling factor, at least 1.
      original_max_position_embeddings: the context of pretraining in tokens (`yarn`, `llama3`).
      low_freq_factor: `llama3`: wavelengths above original / low_freq_factor are divided by `factor`.
      high_freq_factor: `llama3`: wavelengths below original / high_freq_factor are unchanged.
      beta_fast: `yarn`: number of rotations over the original context above which a frequency is unchanged.
      beta_slow: `yarn`: number of rotations below which it is fully interpolated.
      attention_factor: `yarn`: multiplies cos and sin; None means 0.1 ln(factor) + 1.
      truncate: `yarn`: round the ends of the ramp to integers, as the reference code does.

    Raises:
      ConfigError: for an invalid value, naming field and value.
    """

    kind: RopeScalingKind
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        kinds = ("linear", "ntk", "yarn", "llama3")
        if self.kind not in kinds:
            raise ConfigError(f"rope_scaling.kind is {self.kind!r}; it must be one of {', '.join(kinds)}")
        if not 1 <= self.factor <= _MAX_VALUE:
            raise ConfigError(
                f"rope_scaling.factor is {self.factor}; it must be between 1 and {_MAX_VALUE:g}"
            )
        original = self.original_max_position_embeddings
        if self.kind in ("yarn", "llama3") and (original is None or original < 1):
            raise ConfigError(
                f"rope_scaling.original_max_position_embeddings is {original}; {self.kind} scaling "
                "needs the pretraining context length in tokens"
            )
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            raise ConfigError(
                f"rope_scaling.high_freq_factor is {self.high_freq_factor} and low_freq_factor is "
                f"{self.low_freq_factor}; llama3 scaling needs high_freq_factor > low_freq_factor > 0"
            )
        if self.kind == "yarn" and not _MAX_VALUE >= self.beta_fast > self.beta_slow >= 1 / _MAX_VALUE:
            raise ConfigError(
                f"rope_scaling.beta_fast is {self.beta_fast} and beta_slow is {self.beta_slow}; "
                f"yarn scaling needs {_MAX_VALUE:g} >= beta_fast > beta_slow >= {1 / _MAX_VALUE:g}"
            )
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ConfigError(
                f"rope_scaling.attention_factor is {self.attention_factor}; it must be finite and above 0"
            )


class LayerKind(NamedTuple):
    """What may differ between the layers of one model.

    Attributes:
      window: the number of keys that a query attends to, its own included; None for all before it.
      rope: whether queries and keys are rotated.
    """

    window: int | None = None
    rope: bool = True


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama model: its sizes and rotary settings, and nothing about how it is run.

    The defaults are Llama 2 7B (arXiv 2307.09288). The fields from `qkv_bias` on make it one of Llama's kin:
    Mistral, Mixtral, Qwen2, Qwen3, SmolLM3. Instances are hashable, so that they can be static arguments of
    jitted functions.

    Attributes:
      vocab_size: V, size of the token vocabulary.
      hidden_size: D, width of the residual stream.
      intermediate_size: F, width of the SwiGLU feed-forward layer (arXiv 2002.05202).
      num_hidden_layers: L, transformer blocks.
      num_attention_heads: N, query heads.
      num_key_value_heads: K, key and value heads; must divide N. None means N (multi-head
        attention); 1 is multi-query attention; between is grouped-query (arXiv 2305.13245).
      head_dim: H, even. None means D / N.
      max_position_embeddings: the context that the model was trained with, in tokens.
      rms_norm_eps: added to the mean square in RMSNorm (arXiv 1910.07467).
      rope_theta: base of the rotary frequencies (arXiv 2104.09864).
      rope_scaling: how the frequencies are scaled, or None.
      tie_word_embeddings: whether the output projection is the embedding table.
      labels: for a classifier or reward model, the names of the C outputs of the head [D, C], which is
        applied to the last token in place of the output projection; empty for a language model.
      qkv_bias: whether the projections of queries, keys and values have biases (Qwen2).
      out_bias: whether the output projection of attention has one (`attention_bias` of Llama is both).
      mlp_bias: whether the three projections of the feed-forward layer have biases.
      qk_norm: whether the queries and keys of each head are normalized before they are rotated (Qwen3).
      sliding_window: the number of keys that a query attends to, its own included, in layers with a window
        (Mistral 7B v0.1, arXiv 2310.06825); None for all keys before it.
      window_layers: for each layer, whether it has the window; empty: all have it.
      rope_layers: for each layer, whether queries and keys are rotated (SmolLM3 leaves out one in four);
        empty: they are in all.
      num_experts: E, the feed-forward layers of each block, between which a router chooses for each token
        (Mixtral, arXiv 2401.04088); 0 is one feed-forward layer without a router.
      num_experts_per_tok: how many experts each token goes through.

    Raises:
      ConfigError: for an invalid value, naming field and value.
    """

    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = None  # type: ignore[assignment]  # None is replaced in __post_init__
    head_dim: int = None  # type: ignore[assignment]  # None is replaced in __post_init__
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    labels: tuple[str, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] = ()
    rope_layers: tuple[bool, ...] = ()
    num_experts: int = 0
    num_experts_per_tok: int = 0

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for field in _SIZES:
            value = getattr(self, field)
            if field == "head_dim" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field} is {value!r}; it must be a whole number, at least 1")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; change one of them or set head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}; query heads share key/value heads "
                "in equal groups"
            )
        object.__setattr__(self, "labels", tuple(self.labels))
        if not all(isinstance(label, str) for label in self.labels):
            raise ConfigError(f"labels are {self.labels!r}; each must be text")
        for field, least in (("rms_norm_eps", 0), ("rope_theta", 1)):
            value = getattr(self, field)
            if not least < value < math.inf:
                raise ConfigError(f"{field} is {value!r}; it must be a finite number above {least}")
        if self.head_dim == 2 and self.rope_scaling is not None and self.rope_scaling.kind == "ntk":
            raise ConfigError("head_dim is 2; ntk scaling needs more than one pair: choose linear instead")
        self._check_layers()
        self._check_experts()

    def _check_layers(self) -> None:
        """Checks what may differ between layers; layers that are all alike become the empty tuple."""
        window = self.sliding_window
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise ConfigError(
                f"sliding_window is {window!r}; it must be a whole number of keys, at least 1, or left out"
            )
        for field in ("window_layers", "rope_layers"):
            flags = tuple(getattr(self, field))
            if flags and len(flags) != self.num_hidden_layers:
                raise ConfigError(
                    f"{field} has {len(flags)} values; the model has {self.num_hidden_layers} layers"
                )
            if not all(isinstance(flag, bool) for flag in flags):
                raise ConfigError(f"{field} is {flags!r}; each value must be true or false")
            object.__setattr__(self, field, () if all(flags) else flags)
        if self.window_layers and (window is None or not any(self.window_layers)):
            if window is None and any(self.window_layers):
                raise ConfigError("window_layers is set and sliding_window is not; set both or neither")
            object.__setattr__(self, "sliding_window", None)
            object.__setattr__(self, "window_layers", ())

    def _check_experts(self) -> None:
        for field in ("num_experts", "num_experts_per_tok"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{field} is {value!r}; it must be a whole number, at least 0")
        if self.num_experts_per_tok > self.num_experts or (self.num_experts and not self.num_experts_per_tok):
            raise ConfigError(
                f"num_experts_per_tok is {self.num_experts_per_tok} and num_experts {self.num_experts}; each "
                "token goes through at least one expert, and at most all of them"
            )
        if self.num_experts and self.mlp_bias:
            raise ConfigError("mlp_bias is set, and experts have no biases: leave out one of them")

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of every layer."""
        layers = self.num_hidden_layers
        windows = self.window_layers or (True,) * layers
        ropes = self.rope_layers or (True,) * layers
        return tuple(
            LayerKind(self.sliding_window if window else None, rope)
            for window, rope in zip(windows, ropes, strict=True)
        )

    @property
    def layer_period(self) -> int:
        """The number of layers after which their kinds repeat: 1 where all layers are alike."""
        kinds, layers = self.layer_kinds, self.num_hidden_layers
        periods = (n for n in range(1, layers + 1) if layers % n == 0)
        return next(n for n in periods if kinds == kinds[:n] * (layers // n))

    @property
    def has_output(self) -> bool:
        """Whether there is a separate output projection: neither tied embeddings nor a classifier's head."""
        return not (self.tie_word_embeddings or self.labels)

    @property
    def num_params(self) -> int:
        """The number of parameters; tied embeddings are counted once."""
        return self._count_params(max(self.num_experts, 1))

    @property
    def num_active_params(self) -> int:
        """The number of parameters with only as many experts as each token goes through."""
        return self._count_params(max(self.num_experts_per_tok, 1))

    def _count_params(self, experts: int) -> int:
        d, h = self.hidden_size, self.head_dim
        queries, keys = self.num_attention_heads * h, self.num_key_value_heads * h
        attention = 2 * d * (queries + keys) + self.qkv_bias * (queries + 2 * keys) + self.out_bias * d
        attention += self.qk_norm * 2 * h
        feed_forward = 3 * d * self.intermediate_size * experts + d * self.num_experts  # and the router
        feed_forward += self.mlp_bias * (2 * self.intermediate_size + d)
        layer = attention + feed_forward + 2 * d
        tables = self.hidden_size * (self.vocab_size * (1 + self.has_output) + len(self.labels))
        return self.num_hidden_layers * layer + tables + self.hidden_size

    def replace(self, **changes: Any) -> LlamaConfig:
        """A copy with `changes`, validated again."""
        return dataclasses.replace(self, **changes)


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
