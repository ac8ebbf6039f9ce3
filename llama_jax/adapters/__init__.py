"""Adapters of any kind by one set of functions: low-rank ones, bottlenecks and prefixes."""

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
    """An adapter to begin with, see `lora.init`, `bottleneck.init` and `prefix.init`."""
    match settings:
        case Lora():
            return lora.init(settings, params, key)
        case Bottleneck():
            return bottleneck.init(settings, params, key)
        case Prefix():
            return prefix.init(settings, config, params, key)


def attach(settings: Settings, params: Any, adapter: Any) -> Any:
    """The parameters with an adapter on them, which every function of this library takes.

    Args:
      settings: what the adapter was made with.
      params: the base, stacked or not.
      adapter: the tree of `init`, stacked.

    Raises:
      ConfigError: if the adapter's shapes are not those of this base.
    """
    match settings:
        case Lora():
            return lora.attach(settings, params, adapter)
        case Bottleneck():
            return bottleneck.attach(settings, params, adapter)
        case Prefix():
            return prefix.attach(settings, params, adapter)


def check(settings: Settings, config: LlamaConfig, adapter: Any) -> None:
    """Checks by shapes alone that an adapter belongs to a model.

    Raises:
      ConfigError: if it does not.
    """
    base = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))
    jax.eval_shape(lambda base, adapter: attach(settings, base, adapter), base, adapter)


def merge(params: Any) -> Any:
    """Attached parameters as plain ones, see `lora.merge`.

    Raises:
      InputError: for what is no change of weights: prefixes, bottlenecks, adapters chosen by row.
    """
    layer, _ = layer_trees.first_layer(params)
    for name in ("prefix", "bottleneck"):
        if any(name in layer[part] for part in bottleneck.PARTS):
            raise InputError(f"a {name} cannot be merged into weights; keep it attached")
    return lora.merge(params)
