"""The published models by name: `presets.LLAMA2_7B`, and Llama's kin.

Sizes are those of the authors' configuration files. Where base and instruction-tuned models differ (Qwen2.5's
context and epsilon), they are the instruction-tuned ones'. The number of parameters of each is tested against
the published one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llama_jax.config import LlamaConfig, RopeScaling


def _model(hidden: int, intermediate: int, layers: int, heads: int, **rest: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **rest,
    )


# Llama 1: arXiv 2302.13971, table 2; eps and context from Meta's params.json and model.py.
LLAMA_7B = _model(4096, 11_008, 32, 32, max_position_embeddings=2048, rms_norm_eps=1e-6)
LLAMA_13B = _model(5120, 13_824, 40, 40, max_position_embeddings=2048, rms_norm_eps=1e-6)
LLAMA_30B = _model(6656, 17_920, 60, 52, max_position_embeddings=2048, rms_norm_eps=1e-6)
LLAMA_65B = _model(8192, 22_016, 80, 64, max_position_embeddings=2048, rms_norm_eps=1e-5)

# Llama 2: arXiv 2307.09288, table 1; sizes from Meta's params.json. 34B, which was not released, has Code
# Llama's (arXiv 2308.12950). 34B and 70B are grouped-query.
LLAMA2_7B = _model(4096, 11_008, 32, 32)
LLAMA2_13B = _model(5120, 13_824, 40, 40)
LLAMA2_34B = _model(8192, 22_016, 48, 64, num_key_value_heads=8)
LLAMA2_70B = _model(8192, 28_672, 80, 64, num_key_value_heads=8)

# Llama 3: arXiv 2407.21783, table 3; contexts and rope scaling from Meta's params.json.
_LLAMA3: dict[str, Any] = {"vocab_size": 128_256, "rope_theta": 500_000.0, "num_key_value_heads": 8}
LLAMA3_8B = _model(4096, 14_336, 32, 32, max_position_embeddings=8192, **_LLAMA3)
LLAMA3_70B = _model(8192, 28_672, 80, 64, max_position_embeddings=8192, **_LLAMA3)


def _llama3_scaling(factor: float) -> dict[str, Any]:
    scaling = RopeScaling("llama3", factor, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
    return {**_LLAMA3, "max_position_embeddings": 131_072, "rope_scaling": scaling}


LLAMA3_1_8B = _model(4096, 14_336, 32, 32, **_llama3_scaling(8.0))
LLAMA3_1_70B = _model(8192, 28_672, 80, 64, **_llama3_scaling(8.0))
LLAMA3_1_405B = _model(16_384, 53_248, 126, 128, **_llama3_scaling(8.0))
LLAMA3_2_1B = _model(2048, 8192, 16, 32, tie_word_embeddings=True, **_llama3_scaling(32.0))
LLAMA3_2_3B = _model(3072, 8192, 28, 24, tie_word_embeddings=True, **_llama3_scaling(32.0))
LLAMA3_3_70B = LLAMA3_1_70B

# Mistral 7B: arXiv 2310.06825; Mixtral: arXiv 2401.04088. config.json of mistralai's repositories.
_MISTRAL: dict[str, Any] = {"num_key_value_heads": 8, "max_position_embeddings": 32_768}
MISTRAL_7B_V0_1 = _model(4096, 14_336, 32, 32, sliding_window=4096, **_MISTRAL)
MISTRAL_7B_V0_2 = _model(4096, 14_336, 32, 32, rope_theta=1e6, **_MISTRAL)
MISTRAL_7B_V0_3 = MISTRAL_7B_V0_2.replace(vocab_size=32_768)
_EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}
MIXTRAL_8X7B = _model(4096, 14_336, 32, 32, **_EXPERTS, **_MISTRAL)
MIXTRAL_8X22B = _model(
    6144, 16_384, 56, 48, **_EXPERTS, num_key_value_heads=8, max_position_embeddings=65_536
)

# Qwen2.5: arXiv 2412.15115, table 1; Qwen3: arXiv 2505.09388, table 1. config.json of Qwen's repositories.
_QWEN: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 1e6}
_QWEN2: dict[str, Any] = {**_QWEN, "qkv_bias": True, "max_position_embeddings": 32_768}
_TIED: dict[str, Any] = {"vocab_size": 151_936, "tie_word_embeddings": True}
QWEN2_5_0_5B = _model(896, 4864, 24, 14, num_key_value_heads=2, **_TIED, **_QWEN2)
QWEN2_5_1_5B = _model(1536, 8960, 28, 12, num_key_value_heads=2, **_TIED, **_QWEN2)
QWEN2_5_3B = _model(2048, 11_008, 36, 16, num_key_value_heads=2, **_TIED, **_QWEN2)
QWEN2_5_7B = _model(3584, 18_944, 28, 28, num_key_value_heads=4, vocab_size=152_064, **_QWEN2)
QWEN2_5_14B = _model(5120, 13_824, 48, 40, num_key_value_heads=8, vocab_size=152_064, **_QWEN2)
QWEN2_5_32B = _model(5120, 27_648, 64, 40, num_key_value_heads=8, vocab_size=152_064, **_QWEN2)
QWEN2_5_72B = _model(8192, 29_568, 80, 64, num_key_value_heads=8, vocab_size=152_064, **_QWEN2)
_QWEN3: dict[str, Any] = {
    **_QWEN,
    "qk_norm": True,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
QWEN3_0_6B = _model(1024, 3072, 28, 16, **_TIED, **_QWEN3)
QWEN3_1_7B = _model(2048, 6144, 28, 16, **_TIED, **_QWEN3)
QWEN3_4B = _model(2560, 9728, 36, 32, **_TIED, **_QWEN3)
QWEN3_8B = _model(4096, 12_288, 36, 32, vocab_size=151_936, **_QWEN3)
QWEN3_14B = _model(5120, 17_408, 40, 40, vocab_size=151_936, **_QWEN3)
QWEN3_32B = _model(5120, 25_600, 64, 64, vocab_size=151_936, **_QWEN3)

# SmolLM2: arXiv 2502.02737; SmolLM3. config.json of HuggingFaceTB's repositories.
_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SMOLLM2_135M = _model(576, 1536, 30, 9, num_key_value_heads=3, rope_theta=1e5, **_SMOLLM2)
SMOLLM2_360M = _model(960, 2560, 32, 15, num_key_value_heads=5, rope_theta=1e5, **_SMOLLM2)
SMOLLM2_1_7B = _model(2048, 8192, 24, 32, rope_theta=130_000.0, **_SMOLLM2)
SMOLLM3_3B = _model(
    2048,
    11_008,
    36,
    16,
    num_key_value_heads=4,
    vocab_size=128_256,
    max_position_embeddings=65_536,
    rms_norm_eps=1e-6,
    rope_theta=5e6,
    tie_word_embeddings=True,
    rope_layers=(True, True, True, False) * 9,
)

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

presets = SimpleNamespace(**{name: value for name, value in vars().items() if isinstance(value, LlamaConfig)})
