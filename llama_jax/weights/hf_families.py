"""The families of models in Hugging Face's config.json: Llama and its kin, by `model_type`.

Each reads the fields that only it has, with the defaults of transformers' class for absent ones
(transformers/models/FAMILY/configuration_FAMILY.py), into fields of `LlamaConfig`; and writes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.weights.json_fields import JsonFields
from llama_jax.weights.source import quote

FULL, SLIDING = "full_attention", "sliding_attention"
OWN = "llama_jax"  # the model_type of what no class in transformers computes, in our own checkpoints
# The fields of `LlamaConfig` that only kin of Llama have.
_KIN_FIELDS = (
    "qkv_bias",
    "out_bias",
    "mlp_bias",
    "qk_norm",
    "sliding_window",
    "window_layers",
    "rope_layers",
    "num_experts",
    "num_experts_per_tok",
)
_CLASSIFIER = "ForSequenceClassification"
_BOTH_BIASES = ("attention_bias", "mlp_bias")


@dataclasses.dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
      model_type: its name in config.json.
      name: the prefix of its classes in transformers.
      read: maps the fields of config.json to the fields of `LlamaConfig` that only kin of Llama have.
      key_value_heads: K where config.json has none; None means as many as query heads.
      context: the default of max_position_embeddings.
      eps: the default of rms_norm_eps.
      theta: the default of rope_theta.
      head_dim: the default of head_dim; None means D / N.
      tied: the default of tie_word_embeddings.
      biases: which of attention_bias and mlp_bias are fields of config.json.
    """

    model_type: str
    name: str
    read: Callable[[JsonFields], dict[str, Any]]
    key_value_heads: int | None = None
    context: int = 32_768
    eps: float = 1e-6
    theta: float = 10_000.0
    head_dim: int | None = None
    tied: bool = False
    biases: tuple[str, ...] = ()

    @property
    def language_model(self) -> str:
        """The class of a language model, as in config.json's architectures."""
        return f"{self.name}ForCausalLM"

    @property
    def classifier(self) -> str:
        """The class of a classifier or reward model."""
        return f"{self.name}{_CLASSIFIER}"


def family(fields: JsonFields) -> Family:
    """The family of a config.json.

    Raises:
      CheckpointError: if it is not given, or llama_jax does not have it.
    """
    if "model_type" not in fields.fields:
        raise fields.error("model_type is missing; use the config.json that was saved with the model")
    model_type = fields.fields["model_type"]
    if model_type is None:
        return FAMILIES["llama"]
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise fields.error(
            f"model_type is {quote(str(model_type))}; only "
            f"{', '.join(name for name in FAMILIES if name != OWN)} are supported"
        )
    return FAMILIES[model_type]


def family_of(config: LlamaConfig) -> Family:
    """The family whose class in transformers computes this model.

    Raises:
      ConfigError: for a combination of fields that no family has.
    """
    biases = config.qkv_bias or config.out_bias or config.mlp_bias
    if config.num_experts:
        others = biases or config.qk_norm or config.rope_layers or config.window_layers
        chosen = None if others else "mixtral"
    elif config.qkv_bias and not config.out_bias:
        chosen = None if config.qk_norm or config.rope_layers or config.mlp_bias else "qwen2"
    elif config.out_bias and not config.qkv_bias:
        chosen = None
    elif config.qk_norm:
        chosen = None if config.rope_layers or config.mlp_bias else "qwen3"
    elif config.rope_layers or config.window_layers or (config.sliding_window and biases):
        chosen = "smollm3"
    else:
        chosen = "mistral" if config.sliding_window else "llama"
    if chosen is None:
        raise ConfigError(
            "no model of transformers has this combination of experts, biases, norms of queries and keys, "
            "windows and layers without rotation; save it as orbax"
        )
    return FAMILIES[chosen]


def own_family_of(config: LlamaConfig) -> Family:
    """`family_of`, or the family of our own checkpoints for what no other has."""
    try:
        return family_of(config)
    except ConfigError:
        return FAMILIES[OWN]


def family_fields(config: LlamaConfig, chosen: Family) -> dict[str, Any]:
    """The fields of config.json that a family has beside Llama's."""
    fields: dict[str, Any] = {}
    if chosen.model_type == OWN:
        return {name: getattr(config, name) for name in _KIN_FIELDS}
    values = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    fields |= {name: values[name] for name in chosen.biases}
    if chosen.model_type in ("mistral", "mixtral"):
        fields["sliding_window"] = config.sliding_window
    if chosen.model_type == "mixtral":
        fields |= {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        }
    if chosen.model_type in ("qwen2", "qwen3", "smollm3"):
        windows = [kind.window is not None for kind in config.layer_kinds]
        fields |= {
            "use_sliding_window": any(windows),
            "sliding_window": config.sliding_window,
            "layer_types": [SLIDING if window else FULL for window in windows],
        }
        if chosen.model_type != "smollm3":
            # Older versions of transformers have no layer_types: all layers from this one on.
            fields["max_window_layers"] = windows.index(True) if any(windows) else config.num_hidden_layers
    if chosen.model_type == "smollm3":
        fields["no_rope_layers"] = [int(kind.rope) for kind in config.layer_kinds]
    return fields


def _llama(fields: JsonFields) -> dict[str, Any]:
    return {}


def _mistral(fields: JsonFields) -> dict[str, Any]:
    return {"sliding_window": _window(fields, 4096)}


def _mixtral(fields: JsonFields) -> dict[str, Any]:
    return {
        "sliding_window": _window(fields, None),
        "num_experts": fields.integer("num_local_experts", 8, minimum=1),
        "num_experts_per_tok": fields.integer("num_experts_per_tok", 2, minimum=1),
    }


def _qwen2(fields: JsonFields) -> dict[str, Any]:
    first = fields.integer("max_window_layers", 28, minimum=0)
    return {"qkv_bias": True, **_windows(fields, 4096, lambda layer: layer >= first)}


def _qwen3(fields: JsonFields) -> dict[str, Any]:
    first = fields.integer("max_window_layers", 28, minimum=0)
    return {"qk_norm": True, **_windows(fields, 4096, lambda layer: layer >= first)}


def _smollm3(fields: JsonFields) -> dict[str, Any]:
    layers = fields.integer("num_hidden_layers", minimum=1)
    interval = fields.integer("no_rope_layer_interval", 4, minimum=1)
    flags = fields.fields.get("no_rope_layers")
    if flags is None:
        flags = [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(flags, list) or len(flags) < layers or any(flag not in (0, 1) for flag in flags):
        raise fields.error(f"no_rope_layers must be a list of 0 or 1 for each of the {layers} layers")
    rope = tuple(bool(flag) for flag in flags[:layers])
    return {"rope_layers": rope, **_windows(fields, None, lambda layer: not rope[layer])}


def _own(fields: JsonFields) -> dict[str, Any]:
    found = {name: fields.fields[name] for name in _KIN_FIELDS if name in fields.fields}
    for name in ("window_layers", "rope_layers"):
        if not isinstance(found.get(name, []), list):
            raise fields.error(f"{name} must be a list of true or false")
    return found


def _window(fields: JsonFields, default: int | None) -> int | None:
    """`sliding_window`, where null means none and absent the family's default."""
    if fields.fields.get("sliding_window", default) is None:
        return None
    return fields.integer("sliding_window", default)


def _windows(fields: JsonFields, default: int | None, has_window: Callable[[int], bool]) -> dict[str, Any]:
    """The window and the layers that have it, by `use_sliding_window` and `layer_types` or a rule."""
    window = _window(fields, default) if fields.flag("use_sliding_window") else None
    if window is None:
        return {}
    layers = fields.integer("num_hidden_layers", minimum=1)
    types = fields.fields.get("layer_types")
    if types is None:
        types = [SLIDING if has_window(layer) else FULL for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(t not in (FULL, SLIDING) for t in types):
        raise fields.error(
            f"layer_types must be a list of {FULL!r} or {SLIDING!r} for each of the {layers} layers"
        )
    return {"sliding_window": window, "window_layers": tuple(t == SLIDING for t in types)}


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", _llama, context=2048, biases=_BOTH_BIASES),
        Family("mistral", "Mistral", _mistral, key_value_heads=8, context=131_072),
        Family("mixtral", "Mixtral", _mixtral, key_value_heads=8, context=131_072, eps=1e-5, theta=1e6),
        Family("qwen2", "Qwen2", _qwen2, key_value_heads=32),
        Family("qwen3", "Qwen3", _qwen3, key_value_heads=32, head_dim=128, biases=("attention_bias",)),
        Family("smollm3", "SmolLM3", _smollm3, key_value_heads=4, theta=2e6, tied=True, biases=_BOTH_BIASES),
        Family(OWN, "Llama", _own),
    )
}


def is_classifier(fields: JsonFields) -> bool:
    """Whether the architectures of a config.json are a classifier's."""
    architectures = fields.fields.get("architectures")
    return isinstance(architectures, list) and family(fields).classifier in architectures
