"""Converts between Meta's params.json and `LlamaConfig`.

params.json holds the arguments of Meta's `ModelArgs`. The rest is in Meta's code: the head dimension, the
parameters of Llama 3.1's rope scaling, and the formula for the feed-forward width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.rope import effective_theta
from llama_jax.weights.json_fields import JsonFields
from llama_jax.weights.source import format_list, quote

PARAMS_FILE = "params.json"
# The fields of LlamaConfig that params.json cannot express. They need a separate file, because Meta's code
# passes every field of params.json as an argument and fails on unknown ones.
EXTRA_FILE = "llama_jax.json"

_KNOWN = frozenset(
    ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier")
) | {"norm_eps", "rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size"}
# dim and n_layers of Llama 3.2's 1B and 3B, the only models with a rope scaling factor of 32 according to
# Meta's config.json; Meta's own code does not distinguish them (meta-llama/llama-models, issues 166 and 241).
_FACTOR_32_MODELS = frozenset(((2048, 16), (3072, 28)))


def config_from_params(
    folder: Path, params: Mapping[str, Any], extra: Mapping[str, Any], vocab_size: int, intermediate_size: int
) -> LlamaConfig:
    """Converts the fields of params.json to a configuration.

    The context length is not in Meta's files. It is assumed to be Llama 2's 4096 (Llama 1, with 2048, cannot
    be distinguished), 8192 at the theta of Llama 3, 131072 with Llama 3.1's rope scaling, and 16384 at any
    other theta (Code Llama).

    Args:
      folder: the directory, for error messages.
      params: the fields of params.json.
      extra: the fields of llama_jax.json; empty if there is none.
      vocab_size: V of the tensors, used if params.json has -1 (Meta's code then asks the tokenizer).
      intermediate_size: F of the tensors.

    Raises:
      CheckpointError: naming a field that is missing, invalid or not supported.
    """
    fields, extra_fields = JsonFields(folder / PARAMS_FILE, params), JsonFields(folder / EXTRA_FILE, extra)
    unknown = sorted(name for name, value in params.items() if name not in _KNOWN and value is not None)
    if unknown:
        raise fields.error(f"has {format_list(map(quote, unknown))}, which llama_jax does not support")
    dim, layers, heads = (fields.integer(key, minimum=1) for key in ("dim", "n_layers", "n_heads"))
    theta = fields.number("rope_theta", 10_000.0, positive=True)
    scaled = fields.flag("use_scaled_rope")
    rule = (
        fields.integer("multiple_of", 256, minimum=1),
        fields.number("ffn_dim_multiplier", 1.0, positive=True),
    )
    if params.get("multiple_of") is not None and intermediate_size != feed_forward_size(dim, *rule):
        raise fields.error(
            f"requires a feed-forward width of {feed_forward_size(dim, *rule)} but the tensors have "
            f"{intermediate_size}; the files are not of one model"
        )
    context = 4096 if theta == 10_000 else 16_384
    if is_llama3(params):
        context = 131_072 if scaled else 8192
    factor = 32.0 if (dim, layers) in _FACTOR_32_MODELS else 8.0
    declared_vocab_size = fields.integer("vocab_size", -1, minimum=1)
    max_seq_len = fields.integer("max_seq_len", context, minimum=1)
    try:
        return LlamaConfig(
            vocab_size=vocab_size if declared_vocab_size == -1 else declared_vocab_size,
            hidden_size=dim,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("n_kv_heads", heads, minimum=1),
            max_position_embeddings=extra_fields.integer("max_position_embeddings", max_seq_len, minimum=1),
            rms_norm_eps=fields.number("norm_eps", positive=True),
            rope_theta=theta,
            rope_scaling=RopeScaling("llama3", factor, 8192, 1.0, 4.0) if scaled else None,
            tie_word_embeddings=extra_fields.flag("tie_word_embeddings"),
        )
    except ConfigError as error:
        raise fields.error(f"invalid model: {error}") from error


def params_from_config(config: LlamaConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Converts a configuration to the fields of params.json and of llama_jax.json.

    Raises:
      CheckpointError: if Meta's format cannot represent the configuration.
    """
    scaling = config.rope_scaling
    theta = effective_theta(config.rope_theta, scaling, head_dim=config.head_dim)
    if scaling is not None and scaling.kind == "ntk":  # NTK scaling only changes theta
        config = config.replace(rope_theta=theta, rope_scaling=None)
    multiple_of, multiplier = _feed_forward_rule(config.hidden_size, config.intermediate_size)
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "multiple_of": multiple_of,
        "n_heads": config.num_attention_heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
    }
    # Llama 1's and 2's code does not accept all of these fields, so defaults are omitted.
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    if theta != 10_000:
        params["rope_theta"] = theta
    if scaling is not None and scaling.kind == "llama3":
        params |= {"rope_theta": theta, "use_scaled_rope": True}
    extra = {
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    _check_round_trip(config, params, extra)
    return params, extra


def _check_round_trip(config: LlamaConfig, params: dict[str, Any], extra: dict[str, Any]) -> None:
    """Refuses fields that would be read back as another configuration."""
    try:
        read = config_from_params(Path(), params, extra, config.vocab_size, config.intermediate_size)
        problem = "; ".join(
            f"{field.name} is {ours!r} but Meta's code would use {theirs!r}"
            for field in dataclasses.fields(config)
            if (ours := getattr(config, field.name)) != (theirs := getattr(read, field.name))
        )
    except CheckpointError as error:
        problem = str(error)
    if problem:
        raise CheckpointError(f"Meta's format cannot hold this model: {problem}; write another format")


def is_llama3(params: Mapping[str, Any]) -> bool:
    """Whether params.json is for Meta's Llama 3 code, according to its rope settings."""
    return params.get("use_scaled_rope") is True or params.get("rope_theta") == 500_000


def feed_forward_size(dim: int, multiple_of: int, multiplier: float) -> int:
    """Returns F as in Meta's code: 8/3 D times `multiplier`, rounded up to a multiple of `multiple_of`."""
    size = int(multiplier * int(2 * (4 * dim) / 3))
    return multiple_of * math.ceil(size / multiple_of)


def _feed_forward_rule(dim: int, size: int) -> tuple[int, float | None]:
    """Finds `multiple_of` and `multiplier` for which `feed_forward_size` is `size`; Meta's for Llama 2."""
    plain = int(2 * (4 * dim) / 3)
    power = size & -size  # the largest power of two that divides size
    rules: list[tuple[int, float | None]] = [(256, None), (power, None)]
    rules += [(power, round(size / plain, digits)) for digits in range(1, 9)] + [(1, (size + 0.5) / plain)]
    return next(rule for rule in rules if feed_forward_size(dim, rule[0], rule[1] or 1.0) == size)
