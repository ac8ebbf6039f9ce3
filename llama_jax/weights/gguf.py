"""Reads GGUF files of Llama and its kin: the configuration from metadata, tensors dequantized."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.rope import rotary_frequencies
from llama_jax.weights.gguf_split import first_part, read_gguf_header
from llama_jax.weights.names import GGUF_ARCHITECTURES
from llama_jax.weights.source import (
    FLOAT_DTYPES,
    Source,
    TensorInfo,
    decode_floats,
    quote,
    read_bytes,
    slice_rows,
)

# Values per call of gguf.quants, as one row: six times faster than a model's own rows, and whole tensors
# would need several times their size in memory.
_CHUNK = 1 << 17

# Our own fields, which other programs ignore: the parameters from which rope_freqs.weight was computed.
LLAMA3_PREFIX = "llama_jax.rope_scaling."
LLAMA3_FIELDS = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


def open_gguf(path: Path, detected_by: str) -> Source:
    """Opens a GGUF file, and the other parts of its model if it is split.

    Raises:
      CheckpointError: if the file is malformed, or llama_jax does not support the model.
    """
    metadata, tensors = read_gguf_header(path)
    try:
        config = _Fields(path, metadata, tensors).config()
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    by_expert = _split_experts(path, tensors, config)
    return Source("gguf", first_part(path), detected_by, config, by_expert, decode, metadata)


def _split_experts(
    path: Path, tensors: Mapping[str, TensorInfo], config: LlamaConfig
) -> Mapping[str, TensorInfo]:
    """The matrices of experts by themselves, named as in old files: new ones have those of a layer in one.

    Raises:
      CheckpointError: for a tensor of another number of experts.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        match = re.fullmatch(r"(blk\.\d{1,4}\.ffn_(?:gate|up|down))_exps\.weight", name)
        if match is None or not config.num_experts:
            found[name] = info
            continue
        if len(info.shape) != 3 or info.shape[0] != config.num_experts:
            raise CheckpointError(
                f"{path}: tensor {quote(name)} is {list(info.shape)}; its first dimension must be the "
                f"{config.num_experts} experts of llama.expert_count"
            )
        for expert in range(config.num_experts):
            part = slice_rows(info, expert, expert + 1)
            part = dataclasses.replace(part, shape=info.shape[1:])
            found[f"{match[1]}.{expert}.weight"] = part
    return found


def smollm3_rope_layers(layers: int) -> tuple[bool, ...]:
    """The layers that rotate: in llama.cpp, which has no field for it, all but every fourth."""
    return tuple((layer + 1) % 4 != 0 for layer in range(layers))


def decode(name: str, info: TensorInfo, raw: np.ndarray) -> np.ndarray:
    """Decodes a tensor's bytes: floats in their own dtype, quantized types dequantized to f32."""
    if info.dtype in FLOAT_DTYPES:
        return decode_floats(name, info, raw)
    kind = GGMLQuantizationType[info.dtype]
    values_per_block, bytes_per_block = GGML_QUANT_SIZES[kind]
    out = np.empty(math.prod(info.shape), np.float32)
    step = _CHUNK // values_per_block
    for block in range(0, out.size // values_per_block, step):
        rows = raw[block * bytes_per_block : (block + step) * bytes_per_block]
        out[block * values_per_block : (block + step) * values_per_block] = dequantize(rows, kind)
    return out.reshape(info.shape)


class _Fields:
    """The metadata fields of a GGUF file, each checked for its type."""

    def __init__(self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self.architecture = self.text("general.architecture")

    def config(self) -> LlamaConfig:
        if self.architecture not in GGUF_ARCHITECTURES:
            raise self.error(
                f"the architecture is {quote(self.architecture)}; only {', '.join(GGUF_ARCHITECTURES)} are "
                "supported"
            )
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise self.error(
                "there is no matrix 'token_embd.weight', so the model is incomplete; use another file"
            )
        hidden, heads = self.size("embedding_length"), self.size("attention.head_count")
        head_dim = self.size("attention.key_length", hidden // max(heads, 1))
        self.require_value("attention.value_length", head_dim)
        self.require_value("rope.dimension_count", head_dim)
        config = LlamaConfig(
            vocab_size=embedding.shape[0],
            hidden_size=hidden,
            intermediate_size=self.size("feed_forward_length"),
            num_hidden_layers=self.size("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self.size("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=self.size("context_length"),
            rms_norm_eps=self.number("attention.layer_norm_rms_epsilon"),
            rope_theta=self.number("rope.freq_base", 10_000.0),
            tie_word_embeddings="output.weight" not in self.tensors,
            **self.kin_fields(),
        )
        return config.replace(rope_scaling=self.rope_scaling(head_dim, config.rope_theta))

    def kin_fields(self) -> dict[str, Any]:
        """The fields of the configuration that only kin of Llama have, by tensors and by architecture."""
        layers, window = self.size("block_count"), self.size("attention.sliding_window", 0)
        fields: dict[str, Any] = {
            "qkv_bias": "blk.0.attn_q.bias" in self.tensors,
            "out_bias": "blk.0.attn_output.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in self.tensors,
            "qk_norm": "blk.0.attn_q_norm.weight" in self.tensors,
            "sliding_window": window or None,
        }
        if experts := self.size("expert_count", 0):
            fields |= {"num_experts": experts, "num_experts_per_tok": self.size("expert_used_count")}
        if self.architecture == "smollm3":
            fields["rope_layers"] = smollm3_rope_layers(layers)
        return fields

    def rope_scaling(self, head_dim: int, theta: float) -> RopeScaling | None:
        """Reads the rope scaling as llama.cpp does: from fields, or from a tensor of frequency divisors."""
        is_new = f"{self.architecture}.rope.scaling.factor" in self.metadata
        key = "rope.scaling.factor" if is_new else "rope.scale_linear"
        factor = self.number(key, 0.0) or 1.0
        scaled = factor != 1 or f"{self.architecture}.rope.scaling.attn_factor" in self.metadata
        # llama.cpp treats a factor without a type as linear scaling.
        kind = self.text(f"{self.architecture}.rope.scaling.type", "linear") if scaled else "none"
        divisors = self.tensors.get("rope_freqs.weight")
        if divisors is not None:
            if kind != "none":
                raise self.error(
                    f"has rope_freqs.weight and rope scaling of type {quote(kind)}; only one is supported"
                )
            return self.llama3_scaling(divisors, head_dim, theta)
        if kind == "none":
            return None
        if kind == "linear":
            return RopeScaling("linear", factor)
        if kind == "yarn":
            self.require_value("rope.scaling.yarn_log_multiplier", 0.0)
            scaling = RopeScaling(
                "yarn",
                factor,
                original_max_position_embeddings=self.size(
                    "rope.scaling.original_context_length", self.size("context_length")
                ),
                beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0),
                beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0),
            )
            # attn_factor multiplies YaRN's default, so 1 is the default; RopeScaling stores the product.
            attention = self.number("rope.scaling.attn_factor", 1.0)
            if attention == 1:
                return scaling
            default = 0.1 * math.log(factor) + 1
            product = attention * default
            rounded = float(f"{product:.6g}")  # undo the rounding of the writer's division, if it matches
            product = rounded if np.float32(rounded / default) == np.float32(attention) else product
            return dataclasses.replace(scaling, attention_factor=product)
        raise self.error(
            f"rope scaling of type {quote(kind)} is not supported; only linear, yarn and rope_freqs.weight"
        )

    def llama3_scaling(self, info: TensorInfo, head_dim: int, theta: float) -> RopeScaling | None:
        """Recovers the parameters of Llama 3's rope scaling from its frequency divisors.

        The reciprocals 1/d of the divisors are 1/factor for low frequencies and 1 for high ones. Between them
        they interpolate linearly in the frequency f, with weight s = (context f / 2 pi - low) / (high - low).
        Only the ratios of context, low and high are determined, so low is set to 1, as in Meta's models.
        """
        name = "rope_freqs.weight"
        if info.shape != (head_dim // 2,) or info.dtype != "F32":
            raise self.error(
                f"tensor {name!r} is {info.dtype} {list(info.shape)}; it must be F32 [{head_dim // 2}]"
            )
        divisors = decode(name, info, read_bytes(name, info)).astype(np.float64)
        plain, _ = rotary_frequencies(head_dim=head_dim, theta=theta, scaling=None)

        def matches(scaling: RopeScaling) -> bool:
            with np.errstate(all="ignore"):
                scaled, _ = rotary_frequencies(head_dim=head_dim, theta=theta, scaling=scaling)
                return np.allclose(scaled * divisors, plain, rtol=1e-5, atol=0)

        if f"{LLAMA3_PREFIX}factor" in self.metadata:
            factor, context, low, high = (
                self.get(f"{LLAMA3_PREFIX}{key}", int if "max" in key else float, None)
                for key in LLAMA3_FIELDS
            )
            scaling = RopeScaling("llama3", factor, context, low_freq_factor=low, high_freq_factor=high)
            if matches(scaling):
                return scaling
        factor = round(float(divisors.max()), 4)
        if (divisors == 1).all():
            return None
        if np.isfinite(divisors).all() and divisors.min() >= 1 and factor > 1:
            smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
            ramp = (smooth > 1e-4) & (smooth < 1 - 1e-4)
            if ramp.sum() >= 2:
                cycles = plain[ramp].astype(np.float64) / (2 * math.pi)  # per token
                centered = cycles - cycles.mean()
                with np.errstate(all="ignore"):  # non-finite results are refused below
                    slope = centered @ smooth[ramp] / (centered @ centered)
                    intercept = smooth[ramp].mean() - slope * cycles.mean()
                    context, high = float(-slope / intercept), float(1 - 1 / intercept)
                if 1 <= context < 1 << 31 and 1 < high < math.inf:
                    scaling = RopeScaling(
                        "llama3", factor, round(context), low_freq_factor=1.0, high_freq_factor=round(high, 3)
                    )
                    if matches(scaling):
                        return scaling
        raise self.error(
            f"tensor {name!r} does not follow Llama 3's rope scaling; no other divisors are supported"
        )

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise self.error(f"metadata field {key} is missing; the file is incomplete, use another")
        if kind is int and isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = int(value[0])  # one value per layer, all equal
        if type(value) is not kind:
            raise self.error(f"metadata field {key} is {quote(str(value))}; it must be one {kind.__name__}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return str(self.get(key, str, default))

    def size(self, key: str, default: int | None = None) -> int:
        return int(self.get(f"{self.architecture}.{key}", int, default))

    def number(self, key: str, default: float | None = None) -> float:
        return float(self.get(f"{self.architecture}.{key}", float, default))

    def require_value(self, key: str, supported: int | float) -> None:
        """Refuses values that the model does not implement; absent is accepted."""
        value = self.get(f"{self.architecture}.{key}", type(supported), supported)
        if value != supported:
            raise self.error(
                f"metadata field {self.architecture}.{key} is {value}; only {supported} is supported"
            )

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")
