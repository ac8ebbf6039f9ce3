"""Reads Hugging Face model directories: config.json, and safetensors files, one or several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.weights.safetensors import read_json, read_safetensors_header
from llama_jax.weights.source import Source, TensorInfo, brief, decode_floats, quote

CLASSIFIER = "LlamaForSequenceClassification"  # the architecture with a head on the last token
_SINGLE = "model.safetensors"
MOST_LABELS = 1 << 16
_INDEX = "model.safetensors.index.json"


def open_hf(path: Path, why: str) -> Source:
    """Opens a directory that Hugging Face's `save_pretrained` wrote.

    Raises:
      CheckpointError: if a file is missing or malformed, or it holds no Llama that llama_jax can run.
    """
    config, metadata = read_model(path / "config.json")
    return Source("hf", path, why, config, _read_tensors(path), decode_floats, metadata)


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / _SINGLE).exists():
        return read_safetensors_header(folder / _SINGLE)
    if not (folder / _INDEX).exists():
        raise CheckpointError(
            f"{folder}: neither {_SINGLE} nor {_INDEX} is there; save the model with safe_serialization=True"
        )
    index = folder / _INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index}: weight_map is missing or no object; get the file again")
    files = sorted({_shard(index, name, file) for name, file in places.items()})
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise CheckpointError(
            f"{folder}: the index names files that are not there: {brief(absent)}; get them too"
        )
    tensors: dict[str, TensorInfo] = {}
    strays = []
    for file in files:
        for name, info in read_safetensors_header(folder / file).items():
            tensors[name] = info
            if places.get(name) != file:
                strays.append(f"{quote(name)} in {file}")
    lost = [f"{quote(name)} in {file}" for name, file in places.items() if name not in tensors]
    if strays or lost:
        found = f"the files have {brief(strays)} beside it" if strays else ""
        sought = f"it has {brief(lost)} that no file has" if lost else ""
        raise CheckpointError(
            f"{index}: does not match its files: {'; '.join(filter(None, (sought, found)))}"
        )
    return tensors


def _shard(index: Path, tensor: str, file: Any) -> str:
    """Returns a file name from the index, refusing any that leads out of the directory."""
    plain = isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\:\0\r\n")
    if not plain:
        raise CheckpointError(
            f"{index}: tensor {quote(tensor)} is placed in {quote(str(file))}; only .safetensors files of "
            "the same folder are read"
        )
    return file


def read_config(path: Path) -> LlamaConfig:
    """Reads a config.json, with the defaults of Hugging Face's LlamaConfig where a field is absent.

    Raises:
      CheckpointError: if it is missing or malformed, or describes a model that llama_jax does not run.
    """
    return read_model(path)[0]


def read_model(path: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """`read_config`, with a classifier's `pad_token_id`: its numbers are read at the last other token."""
    fields = _Fields(path, read_json(path))
    config = fields.config()
    return config, {"pad_token_id": fields.pad_token_id(config.vocab_size)} if config.labels else {}


def unnamed(count: int) -> tuple[str, ...]:
    """What Hugging Face calls classes without names."""
    return tuple(f"LABEL_{i}" for i in range(count))


def problem_type(count: int) -> str:
    """What transformers takes a head of so many numbers to be for."""
    return "regression" if count == 1 else "single_label_classification"


class _Fields:
    """Reads a configuration out of JSON fields, each checked for its type."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def config(self) -> LlamaConfig:
        if "model_type" not in self.fields:
            raise self.error("model_type is missing; use the config.json that was saved with the model")
        self.only("model_type", "llama")
        self.only("hidden_act", "silu", "swish")  # two names of one function
        self.only("attention_bias", False)
        self.only("mlp_bias", False)
        if self.fields.get("quantization_config") is not None:
            raise self.error("quantization_config is set; quantised weights are read from GGUF files alone")
        heads, hidden = self.size("num_attention_heads"), self.size("hidden_size")
        context = self.size("max_position_embeddings", 2048)
        tied = self.fields.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise self.error(f"tie_word_embeddings is {quote(str(tied))}; it must be true or false")
        # transformers 5 moved rope_theta and rope_scaling into rope_parameters.
        rope = self.section("rope_scaling", "rope_parameters")
        try:
            return LlamaConfig(
                vocab_size=self.size("vocab_size"),
                hidden_size=hidden,
                intermediate_size=self.size("intermediate_size"),
                num_hidden_layers=self.size("num_hidden_layers"),
                num_attention_heads=heads,
                num_key_value_heads=self.size("num_key_value_heads", heads),
                head_dim=self.size("head_dim", hidden // max(heads, 1)),
                max_position_embeddings=context,
                rms_norm_eps=self.number("rms_norm_eps", 1e-6),
                rope_theta=rope.number("rope_theta", self.number("rope_theta", 10_000.0)),
                rope_scaling=rope.rope_scaling(context),
                tie_word_embeddings=tied,
                labels=self.labels(),
            )
        except ConfigError as error:
            raise self.error(str(error)) from error

    def labels(self) -> tuple[str, ...]:
        """Reads the names of a classifier's classes; none of a language model."""
        kinds = self.fields.get("architectures")
        if not isinstance(kinds, list) or CLASSIFIER not in kinds:
            return ()
        names = self.fields.get("id2label")
        if names is None:  # transformers writes no id2label of two that have no names
            count = self.size("num_labels", 2)
            if not 1 <= count <= MOST_LABELS:
                raise self.error(f"num_labels is {count}; it must be from 1 to {MOST_LABELS}")
            names = {str(i): name for i, name in enumerate(unnamed(count))}
        if not isinstance(names, dict) or not names or len(names) > MOST_LABELS:
            raise self.error(f"id2label is no object of 1 to {MOST_LABELS} names; give every class one")
        found = [names.get(str(i)) for i in range(len(names))]
        labels = tuple(name for name in found if isinstance(name, str))
        if len(labels) < len(found):
            raise self.error(f"id2label does not name each of the classes 0 to {len(found) - 1}")
        kind = problem_type(len(labels))
        if self.fields.get("problem_type") not in (None, kind):
            raise self.error(
                f"problem_type is {quote(str(self.fields['problem_type']))}; a head of {len(labels)} can "
                f"only be {kind}"
            )
        return labels

    def pad_token_id(self, vocab_size: int) -> int | None:
        value = self.fields.get("pad_token_id")
        if value is None or (type(value) is int and 0 <= value < vocab_size):
            return value
        raise self.error(f"pad_token_id is {quote(str(value))}; it must be an id below {vocab_size}")

    def rope_scaling(self, context: int) -> RopeScaling | None:
        """Reads the scaling as `transformers.modeling_rope_utils` does."""
        kind = self.fields.get("rope_type") or self.fields.get("type") or "default"
        if self.number("partial_rotary_factor", 1.0) != 1:
            raise self.error("partial_rotary_factor is not 1; every dimension of a head must be rotated")
        if kind == "default":
            return None
        if kind == "dynamic":
            raise self.error(
                "rope_type is 'dynamic', which changes with a text's length beyond max_position_embeddings, "
                f"so that cached keys go stale; up to those {context} tokens it does nothing: remove it"
            )
        if kind not in ("linear", "yarn", "llama3"):
            raise self.error(
                f"rope_type is {quote(str(kind))}; only default, linear, yarn and llama3 can be run"
            )
        original = self.size("original_max_position_embeddings", context)
        if kind == "yarn" and self.fields.get("factor") is None:
            factor = context / max(original, 1)  # an original of 0 is refused below
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
        """Returns the factor on cos and sin, or None for YaRN's own rule (arXiv 2309.00071, 3.4)."""
        if self.fields.get("attention_factor") is not None:
            return self.number("attention_factor")
        mscale, mscale_all_dim = self.number("mscale", 0.0), self.number("mscale_all_dim", 0.0)
        if not (mscale and mscale_all_dim):
            return None
        if factor <= 1:
            return 1.0
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)

    def section(self, *keys: str) -> _Fields:
        """Returns the fields of the first of these objects that is there, or none."""
        for key in keys:
            if inner := self.fields.get(key):
                if not isinstance(inner, dict):
                    raise self.error(f"{key} is {quote(str(inner))}; it must be an object")
                # transformers lets this one win from outside, too.
                context = "original_max_position_embeddings"
                outer = {context: self.fields[context]} if context in self.fields else {}
                return _Fields(self.path, inner | outer)
        return _Fields(self.path, {})

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value >= 1 << 31:
            raise self.error(f"{key} is {quote(str(value))}; it must be a whole number below 2^31")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not abs(value) < 1e300:
            raise self.error(f"{key} is {quote(str(value))}; it must be a finite number")
        return float(value)

    def get(self, key: str, default: Any) -> Any:
        value = self.fields.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(f"{key} is missing; use the config.json that was saved with the model")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses a field that says what llama_jax's model does not do; absent or null is fine."""
        value = self.fields.get(key)
        if value is not None and value not in allowed:
            raise self.error(
                f"{key} is {quote(str(value))}; only {' or '.join(map(str, allowed))} can be run"
            )

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")
