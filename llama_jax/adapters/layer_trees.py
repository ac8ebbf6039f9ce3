"""Trees beside the layers of a parameter tree, whether those are stacked or a tuple with one tree each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from llama_jax.errors import InputError


def require_stacked(params: Any) -> None:
    """Checks that layers are stacked, as adapters begin on them.

    Raises:
      InputError: if they are not.
    """
    if not isinstance(params["layers"], Mapping):
        raise InputError(
            "adapters begin on parameters whose layers are stacked; lj.load(..., scan_layers=True)"
        )


def first_layer(params: Any) -> tuple[Any, int]:
    """One layer's tree, its leaves stacked if all are, and how many layers there are."""
    layers = params["layers"]
    if isinstance(layers, Mapping):
        return layers, layers["attention_norm"]["scale"].shape[0]
    return layers[0], len(layers)


def put(params: Any, adapter: Any, function: Callable[[Any, Any], Any]) -> Any:
    """Parameters with `function(layer, its part of the adapter)` for each layer; the adapter is stacked."""
    layers = params["layers"]
    if isinstance(layers, Mapping):
        return {**params, "layers": function(layers, adapter["layers"])}
    each = (jax.tree.map(lambda x, i=i: x[i], adapter["layers"]) for i in range(len(layers)))
    return {**params, "layers": tuple(function(*pair) for pair in zip(layers, each, strict=True))}


def take(params: Any, function: Callable[[Any], tuple[Any, Any]]) -> tuple[Any, Any]:
    """The parameters and the adapter that `function(layer)` takes each layer apart into."""
    layers = params["layers"]
    if isinstance(layers, Mapping):
        base, own = function(layers)
        return {**params, "layers": base}, {"layers": own}
    pairs = [function(layer) for layer in layers]
    return {**params, "layers": tuple(base for base, _ in pairs)}, {"layers": tuple(own for _, own in pairs)}
