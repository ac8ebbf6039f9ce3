"""Reads Hugging Face model directories: config.json, and the tensors that `hf_tensors` finds beside it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import ConfigError
from llama_jax.weights.hf_families import Family, family, is_classifier
from llama_jax.weights.hf_tensors import HFSource, drop_zero_biases, find_biases, read_tensors, resolve_tied
from llama_jax.weights.json_fields import JsonFields, read_json
from llama_jax.weights.quantized import dequantized
from llama_jax.weights.source import Source, decode_floats, quote

MAX_LABELS = 1 << 16


def open_hf(path: Path, detected_by: str) -> Source:
    """Opens a directory that Hugging Face's `save_pretrained` wrote.

    Raises:
      CheckpointError: if a file is missing or malformed, or llama_jax does not support the model.
    """
    fields = _Fields(path / "config.json", read_json(path / "config.json"))
    config, metadata = fields.config_and_metadata()
    tensors = dequantized(fields.path, fields.quantization(), read_tensors(path))
    if family(fields).biases:
        biases = find_biases(tensors, fields.modules_with_bias())
        config = config.replace(qkv_bias="qkv" in biases, out_bias="o" in biases, mlp_bias="mlp" in biases)
        tensors = drop_zero_biases(tensors, biases)
    config = config.replace(tie_word_embeddings=resolve_tied(tensors, config.tie_word_embeddings))
    return HFSource("hf", path, detected_by, config, tensors, decode_floats, metadata)


def read_config(path: Path) -> LlamaConfig:
    """Reads a config.json, with the defaults of Hugging Face's LlamaConfig for absent fields.

    Raises:
      CheckpointError: if it is missing or malformed, or llama_jax does not support the model.
    """
    return read_config_and_metadata(path)[0]


def read_config_and_metadata(path: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """Like `read_config`, and a classifier's `pad_token_id`: scores are read at the last non-pad token."""
    return _Fields(path, read_json(path)).config_and_metadata()


def default_labels(count: int) -> tuple[str, ...]:
    """Returns Hugging Face's default names of `count` classes."""
    return tuple(f"LABEL_{i}" for i in range(count))


def problem_type(count: int) -> str:
    """Returns the `problem_type` that transformers infers for a head of `count` labels."""
    return "regression" if count == 1 else "single_label_classification"


class _Fields(JsonFields):
    """The fields of a config.json."""

    def config_and_metadata(self) -> tuple[LlamaConfig, dict[str, Any]]:
        config = self.config()
        return config, {"pad_token_id": self.pad_token_id(config.vocab_size)} if config.labels else {}

    def quantization(self) -> dict[str, Any]:
        """The settings of a quantized model; empty for others."""
        settings = self.fields.get("quantization_config") or self.fields.get("compression_config") or {}
        if not isinstance(settings, dict):
            raise self.error(f"quantization_config is {quote(str(settings))}; it must be an object")
        return settings

    def modules_with_bias(self) -> list[str]:
        """The modules whose projections have biases, by the names that tensors have."""
        settings = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
        known = family(self).biases
        return [name for name, setting in settings.items() if setting in known and self.fields.get(setting)]

    def config(self) -> LlamaConfig:
        kind = family(self)
        self.require_value("hidden_act", "silu", "swish")  # synonyms
        for setting in kind.biases:
            self.require_value(setting, False, True)  # the files decide: `find_biases`
        heads, hidden = self.integer("num_attention_heads"), self.integer("hidden_size")
        # Only a field that is absent has the family's default; null means N heads, of D / N dimensions.
        head_dim = None if "head_dim" in self.fields else kind.head_dim
        key_value_heads = None if "num_key_value_heads" in self.fields else kind.key_value_heads
        tied = self.fields.get("tie_word_embeddings") is None and kind.tied
        context = self.integer("max_position_embeddings", kind.context)
        # transformers 5 moved rope_theta and rope_scaling into rope_parameters.
        rope = self.section("rope_scaling", "rope_parameters")
        try:
            return LlamaConfig(
                vocab_size=self.integer("vocab_size"),
                hidden_size=hidden,
                intermediate_size=self.integer("intermediate_size"),
                num_hidden_layers=self.integer("num_hidden_layers"),
                num_attention_heads=heads,
                num_key_value_heads=self.integer("num_key_value_heads", key_value_heads or heads),
                head_dim=self.integer("head_dim", head_dim or hidden // max(heads, 1)),
                max_position_embeddings=context,
                rms_norm_eps=self.number("rms_norm_eps", kind.eps),
                rope_theta=rope.number("rope_theta", self.number("rope_theta", kind.theta)),
                rope_scaling=rope.rope_scaling(context),
                tie_word_embeddings=tied or self.flag("tie_word_embeddings"),
                labels=self.labels(),
                **self.kin_fields(kind),
            )
        except ConfigError as error:
            raise self.error(str(error)) from error

    def kin_fields(self, kind: Family) -> dict[str, Any]:
        """The fields of `LlamaConfig` that only kin of Llama have."""
        attention, mlp = (name in kind.biases and self.flag(name) for name in ("attention_bias", "mlp_bias"))
        return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": mlp} | kind.read(self)

    def labels(self) -> tuple[str, ...]:
        """Reads the class names of a classifier; empty for a language model."""
        if not is_classifier(self):
            return ()
        names = self.fields.get("id2label")
        if names is None:  # transformers omits id2label for two classes with default names
            count = self.integer("num_labels", 2)
            if not 1 <= count <= MAX_LABELS:
                raise self.error(f"num_labels is {count}; it must be from 1 to {MAX_LABELS}")
            names = {str(i): name for i, name in enumerate(default_labels(count))}
        if not isinstance(names, dict) or not names or len(names) > MAX_LABELS:
            raise self.error(f"id2label must be an object of 1 to {MAX_LABELS} names, one for each class")
        values = [names.get(str(i)) for i in range(len(names))]
        labels = tuple(name for name in values if isinstance(name, str))
        if len(labels) < len(values):
            raise self.error(f"id2label does not name each of the classes 0 to {len(values) - 1}")
        expected = problem_type(len(labels))
        if self.fields.get("problem_type") not in (None, expected):
            raise self.error(
                f"problem_type is {quote(str(self.fields['problem_type']))}; a head of {len(labels)} labels "
                f"must be {expected}"
            )
        return labels

    def pad_token_id(self, vocab_size: int) -> int | None:
        value = self.fields.get("pad_token_id")
        if value is None or (type(value) is int and 0 <= value < vocab_size):
            return value
        raise self.error(f"pad_token_id is {quote(str(value))}; it must be an id below {vocab_size}")

    def rope_scaling(self, context: int) -> RopeScaling | None:
        """Reads the rope scaling as `transformers.modeling_rope_utils` does."""
        kind = self.fields.get("rope_type") or self.fields.get("type") or "default"
        if self.number("partial_rotary_factor", 1.0) != 1:
            raise self.error("partial_rotary_factor is not 1; every dimension of a head must be rotated")
        if kind in ("default", "dynamic"):  # dynamic NTK scaling begins after max_position_embeddings
            return None
        if kind not in ("linear", "yarn", "llama3"):
            raise self.error(
                f"rope_type is {quote(str(kind))}; only default, linear, dynamic, yarn and llama3 are "
                "supported"
            )
        original = self.integer("original_max_position_embeddings", context)
        if kind == "yarn" and self.fields.get("factor") is None:
            factor = context / max(original, 1)  # RopeScaling refuses 0
        else:
            factor = self.number("factor")
        if kind == "linear":
            return RopeScaling("linear", factor)
        if kind == "llama3":
            return RopeScaling(
                "llama3",
                factor,
                original,
                low_freq_factor=self.number("low_freq_factor"),
                high_freq_factor=self.number("high_freq_factor"),
            )
        return RopeScaling(
            "yarn",
            factor,
            original,
            beta_fast=self.number("beta_fast", 0.0) or 32.0,
            beta_slow=self.number("beta_slow", 0.0) or 1.0,
            attention_factor=self.yarn_attention_factor(factor),
            truncate=bool(self.fields.get("truncate", True)),
        )

    def yarn_attention_factor(self, factor: float) -> float | None:
        """Returns the scale of cos and sin, or None for YaRN's default (arXiv 2309.00071, 3.4)."""
        if self.fields.get("attention_factor") is not None:
            return self.number("attention_factor")
        mscale, mscale_all_dim = self.number("mscale", 0.0), self.number("mscale_all_dim", 0.0)
        if not (mscale and mscale_all_dim):
            return None
        if factor <= 1:
            return 1.0
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)

    def section(self, *keys: str) -> _Fields:
        """Returns the fields of the first of these objects that is present and not empty."""
        for key in keys:
            if inner := self.fields.get(key):
                if not isinstance(inner, dict):
                    raise self.error(f"{key} is {quote(str(inner))}; it must be an object")
                # In transformers, too, the outer field takes precedence.
                context = "original_max_position_embeddings"
                outer = {context: self.fields[context]} if context in self.fields else {}
                return _Fields(self.path, inner | outer)
        return _Fields(self.path, {})

    def require_value(self, key: str, *supported: Any) -> None:
        """Refuses values that the model does not implement; absent and null are accepted."""
        value = self.fields.get(key)
        if value is not None and value not in supported:
            raise self.error(
                f"{key} is {quote(str(value))}; only {' or '.join(map(str, supported))} is supported"
            )
