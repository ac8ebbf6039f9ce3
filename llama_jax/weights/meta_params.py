"""Meta's params.json: the configuration that it describes, and the description of a configuration.

It holds the arguments of Meta's `ModelArgs`. The rest is in Meta's code: the width of a head, the numbers of
Llama 3.1's rotary scaling, and the rule for the width of the feed-forward layer.
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
from llama_jax.weights.source import brief, quote

PARAMS = "params.json"
# What LlamaConfig has and params.json has not. It is a file of its own since Meta's code takes every field of
# params.json for an argument, and refuses one that it does not know.
EXTRA = "llama_jax.json"

_KNOWN = frozenset(
    ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier")
) | {"norm_eps", "rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size"}
# Dimension and layers of Llama 3.2's 1B and 3B, which alone are stretched by 32: so says Meta's config.json;
# Meta's own code makes no difference (meta-llama/llama-models, issues 166 and 241).
_STRETCHED_BY_32 = frozenset(((2048, 16), (3072, 28)))


def config_of(
    folder: Path, params: Mapping[str, Any], extra: Mapping[str, Any], vocab_size: int, intermediate_size: int
) -> LlamaConfig:
    """Reads a configuration.

    The context a model was trained for is not in Meta's files. It is taken to be Llama 2's 4096 (nothing
    tells Llama 1, which has 2048, from it), 8192 at the theta of Llama 3, 131072 with Llama 3.1's rotary
    scaling, and 16384 at any other theta, which is Code Llama's.

    Args:
      folder: where the files are, for messages.
      params: params.json's fields.
      extra: the fields of llama_jax.json, if there is one.
      vocab_size: V of the tensors, which Meta's code takes from the tokenizer where params.json has -1.
      intermediate_size: F of the tensors.

    Raises:
      CheckpointError: naming a field that is missing or wrong, or that llama_jax's model knows nothing of.
    """
    fields, ours = Fields(folder / PARAMS, params), Fields(folder / EXTRA, extra)
    unknown = sorted(name for name, value in params.items() if name not in _KNOWN and value is not None)
    if unknown:
        raise fields.error(f"has {brief(map(quote, unknown))}, which the model here knows nothing of")
    dim, layers, heads = fields.size("dim"), fields.size("n_layers"), fields.size("n_heads")
    theta, scaled = fields.number("rope_theta", 10_000.0), fields.flag("use_scaled_rope")
    rule = (fields.size("multiple_of", 256), fields.number("ffn_dim_multiplier", 1.0))
    if params.get("multiple_of") is not None and intermediate_size != feed_forward_size(dim, *rule):
        raise fields.error(
            f"asks for a feed-forward width of {feed_forward_size(dim, *rule)} but the tensors have "
            f"{intermediate_size}; the files are not of one model"
        )
    context = 4096 if theta == 10_000 else 16_384
    if is_llama3(params):
        context = 131_072 if scaled else 8192
    factor = 32.0 if (dim, layers) in _STRETCHED_BY_32 else 8.0
    stated = fields.size("vocab_size", -1)
    try:
        return LlamaConfig(
            vocab_size=vocab_size if stated == -1 else stated,
            hidden_size=dim,
            intermediate_size=intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=fields.size("n_kv_heads", heads),
            max_position_embeddings=ours.size("max_position_embeddings", fields.size("max_seq_len", context)),
            rms_norm_eps=fields.number("norm_eps"),
            rope_theta=theta,
            rope_scaling=RopeScaling("llama3", factor, 8192, 1.0, 4.0) if scaled else None,
            tie_word_embeddings=ours.flag("tie_word_embeddings"),
        )
    except ConfigError as error:
        raise fields.error(f"describes no model: {error}") from error


def params_of(config: LlamaConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Describes a configuration: the fields of params.json, and those of llama_jax.json.

    Raises:
      CheckpointError: if Meta's code would make another model of any such description.
    """
    scaling = config.rope_scaling
    theta = effective_theta(config.rope_theta, scaling, head_dim=config.head_dim)
    if scaling is not None and scaling.kind == "ntk":  # which is another theta and nothing else
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
    # Llama 1 and 2 know only some of these: each is there only where it says something.
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
    _check_said(config, params, extra)
    return params, extra


def _check_said(config: LlamaConfig, params: dict[str, Any], extra: dict[str, Any]) -> None:
    """Refuses a description from which another configuration would be read."""
    try:
        read = config_of(Path(), params, extra, config.vocab_size, config.intermediate_size)
        problem = "; ".join(
            f"{field.name} is {ours!r} but Meta's code would take {theirs!r}"
            for field in dataclasses.fields(config)
            if (ours := getattr(config, field.name)) != (theirs := getattr(read, field.name))
        )
    except CheckpointError as error:
        problem = str(error)
    if problem:
        raise CheckpointError(f"Meta's format cannot hold this model: {problem}; write another format")


def is_llama3(params: Mapping[str, Any]) -> bool:
    """Whether params.json is for Meta's code of Llama 3, by its rotary settings."""
    return params.get("use_scaled_rope") is True or params.get("rope_theta") == 500_000


def feed_forward_size(dim: int, multiple_of: int, multiplier: float) -> int:
    """The width F in Meta's code: 8/3 D times `multiplier`, up to a multiple of `multiple_of`."""
    size = int(multiplier * int(2 * (4 * dim) / 3))
    return multiple_of * math.ceil(size / multiple_of)


def _feed_forward_rule(dim: int, size: int) -> tuple[int, float | None]:
    """Finds arguments for which `feed_forward_size` is `size`: Meta's own for the sizes of Llama 2."""
    plain = int(2 * (4 * dim) / 3)
    power = size & -size  # the largest power of two that divides it
    rules: list[tuple[int, float | None]] = [(256, None), (power, None)]
    rules += [(power, round(size / plain, digits)) for digits in range(1, 9)] + [(1, (size + 0.5) / plain)]
    return next(rule for rule in rules if feed_forward_size(dim, rule[0], rule[1] or 1.0) == size)


class Fields:
    """JSON fields, each checked for its type."""

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def size(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or not (0 < value < 1 << 31 or value == default):
            raise self.error(f"has {key} {quote(str(value))}; it must be a whole number between 1 and 2^31")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e30:
            raise self.error(f"has {key} {quote(str(value))}; it must be a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._get(key, False)
        if type(value) is not bool:
            raise self.error(f"has {key} {quote(str(value))}; it must be true or false")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.fields.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"has no {key}; use the file that was saved with the model")
        return value

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")
