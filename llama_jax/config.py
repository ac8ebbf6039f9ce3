"""The configuration of a Llama: one frozen, validated dataclass, and the published sizes.

Field names are those of Hugging Face's `LlamaConfig`. The letters beside them are defined in
`llama_jax/__init__.py`.
"""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any, Literal

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


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A Llama model: its sizes and rotary settings, and nothing about how it is run.

    The defaults are Llama 2 7B (arXiv 2307.09288). Instances are hashable, so that they can be static
    arguments of jitted functions.

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

    @property
    def has_output(self) -> bool:
        """Whether there is a separate output projection: neither tied embeddings nor a classifier's head."""
        return not (self.tie_word_embeddings or self.labels)

    @property
    def num_params(self) -> int:
        """The number of parameters; tied embeddings are counted once."""
        attention = (
            2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        )
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        layer = attention + feed_forward + 2 * self.hidden_size
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


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **rest: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **rest,
    )


# Llama 1: arXiv 2302.13971, table 2; eps and context from Meta's params.json and model.py.
LLAMA_7B = _llama(4096, 11_008, 32, 32, max_position_embeddings=2048, rms_norm_eps=1e-6)
LLAMA_13B = _llama(5120, 13_824, 40, 40, max_position_embeddings=2048, rms_norm_eps=1e-6)
LLAMA_30B = _llama(6656, 17_920, 60, 52, max_position_embeddings=2048, rms_norm_eps=1e-6)
LLAMA_65B = _llama(8192, 22_016, 80, 64, max_position_embeddings=2048, rms_norm_eps=1e-5)

# Llama 2: arXiv 2307.09288, table 1; sizes from Meta's params.json. 70B alone is grouped-query.
LLAMA2_7B = _llama(4096, 11_008, 32, 32)
LLAMA2_13B = _llama(5120, 13_824, 40, 40)
LLAMA2_70B = _llama(8192, 28_672, 80, 64, num_key_value_heads=8)

# For tests and examples: all sizes differ, heads are grouped, a forward pass takes milliseconds.
TINY = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=256,
)

# SmolLM2 135M, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct/blob/main/config.json
SMOLLM2_135M = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_theta=100_000.0,
    tie_word_embeddings=True,
)

presets = SimpleNamespace(
    LLAMA_7B=LLAMA_7B,
    LLAMA_13B=LLAMA_13B,
    LLAMA_30B=LLAMA_30B,
    LLAMA_65B=LLAMA_65B,
    LLAMA2_7B=LLAMA2_7B,
    LLAMA2_13B=LLAMA2_13B,
    LLAMA2_70B=LLAMA2_70B,
    TINY=TINY,
    SMOLLM2_135M=SMOLLM2_135M,
)
