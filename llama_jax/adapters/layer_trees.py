"""Maps over the layers of a parameter tree, stacked in one tree [L, ...] or held as a tuple of trees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from llama_jax.errors import InputError


def require_stacked(params: Any) -> None:
    """Checks that the layers are stacked, as initializing an adapter requires.

    Raises:
      InputError: if they are not.
    """
    if not isinstance(params["layers"], Mapping):
        raise InputError("an adapter is initialized from stacked layers; use lj.load(..., scan_layers=True)")


def first_layer(params: Any) -> tuple[Any, int]:
    """Returns the first layer's tree (the stacked tree if layers are stacked) and the number of layers."""
    layers = params["layers"]
    if isinstance(layers, Mapping):
        return layers, layers["attention_norm"]["scale"].shape[0]
    return layers[0], len(layers)


def map_layers(function: Callable[..., Any], params: Any, *adapters: Any) -> Any:
    """Replaces each layer by `function(layer, *adapter_layers)`.

    Args:
      function: called once on the stacked trees, or once per layer.
      params: the parameters, layers stacked or not.
      *adapters: trees `{"layers": ...}`, always stacked.
    """
    layers = params["layers"]
    stacked = [adapter["layers"] for adapter in adapters]
    if isinstance(layers, Mapping):
        return {**params, "layers": function(layers, *stacked)}
    mapped = (function(layer, *jax.tree.map(lambda x, i=i: x[i], stacked)) for i, layer in enumerate(layers))
    return {**params, "layers": tuple(mapped)}


def split_layers(function: Callable[[Any], tuple[Any, Any]], params: Any) -> tuple[Any, Any]:
    """Splits each layer by `function(layer) -> (base_layer, adapter_layer)`.

    Returns:
      The base parameters and the adapter, both stacked if `params` is.
    """
    layers = params["layers"]
    if isinstance(layers, Mapping):
        base, adapter = function(layers)
        return {**params, "layers": base}, {"layers": adapter}
    pairs = [function(layer) for layer in layers]
    return (
        {**params, "layers": tuple(base for base, _ in pairs)},
        {"layers": tuple(adapter for _, adapter in pairs)},
    )
