"""Parameter-efficient adapters behind one set of functions: LoRA, bottleneck adapters and prefix tuning."""

from __future__ import annotations

from typing import Any

import jax

from llama_jax import model
from llama_jax.adapters import bottleneck, layer_trees, lora, prefix
from llama_jax.adapters.bottleneck import Bottleneck
from llama_jax.adapters.lora import Lora
from llama_jax.adapters.prefix import Prefix
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError

Settings = Lora | Bottleneck | Prefix


def init(settings: Settings, config: LlamaConfig, params: Any, key: jax.Array) -> Any:
    """Initializes an adapter; see `lora.init`, `bottleneck.init` and `prefix.init`."""
    match settings:
        case Lora():
            return lora.init(settings, params, key)
        case Bottleneck():
            return bottleneck.init(settings, params, key)
        case Prefix():
            return prefix.init(settings, config, params, key)


def attach(settings: Settings, params: Any, adapter: Any) -> Any:
    """Inserts an adapter into the parameter tree, for use as `params` in every function of this library.

    Args:
      settings: the adapter's settings.
      params: the base parameters, layers stacked or not.
      adapter: the tree of `init`, stacked.

    Raises:
      ConfigError: if the adapter's shapes do not match the base's.
    """
    match settings:
        case Lora():
            return lora.attach(settings, params, adapter)
        case Bottleneck():
            return bottleneck.attach(settings, params, adapter)
        case Prefix():
            return prefix.attach(settings, params, adapter)


def check(settings: Settings, config: LlamaConfig, adapter: Any) -> None:
    """Checks, from shapes alone, that an adapter fits a model.

    Raises:
      ConfigError: if it does not.
    """
    base = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    jax.eval_shape(lambda base, adapter: attach(settings, base, adapter), base, adapter)


def merge(params: Any) -> Any:
    """Merges attached adapters into the weights, see `lora.merge`.

    Raises:
      InputError: for adapters that are not a weight update: prefixes, bottlenecks, per-row adapters.
    """
    layer, _ = layer_trees.first_layer(params)
    for name in ("prefix", "bottleneck"):
        if any(name in layer[sublayer] for sublayer in bottleneck.SUBLAYERS):
            raise InputError(f"a {name} cannot be merged into weights; keep it attached")
    return lora.merge(params)
