"""Bottleneck adapters as tree functions: init / attach / split (Houlsby et al., arXiv 1902.00751).

A residual two-layer network, y + f(y down) up, follows each layer's attention, feed-forward network, or both.
It is not linear, so there is no `merge`. See `lora` for how adapters and parameters fit together.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.adapters import layer_trees
from llama_jax.errors import ConfigError
from llama_jax.ops.adapted import Activation, BottleneckWeights

SUBLAYERS = ("attention", "feed_forward")  # that can have an adapter


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """Settings of a bottleneck adapter.

    Attributes:
      size: M, the bottleneck dimension.
      target_modules: patterns that match `attention` or `feed_forward`, the adapted sublayers; both by
        default, as in the paper.
      activation: f; `silu` by default, as in the model itself.

    Raises:
      ConfigError: for an invalid size, an unknown activation, or a pattern that matches nothing.
    """

    size: int = 64
    target_modules: tuple[str, ...] = ("*",)
    activation: Activation = "silu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ConfigError(
                f"adapter.bottleneck_size is {self.size!r}; it must be a whole number, at least 1"
            )
        if self.activation not in get_args(Activation):
            raise ConfigError(
                f"activation {self.activation!r} is unknown; use one of {', '.join(get_args(Activation))}"
            )
        _ = self.sublayers

    @property
    def sublayers(self) -> tuple[str, ...]:
        """The sublayers that get an adapter.

        Raises:
          ConfigError: for a pattern that matches none.
        """
        for pattern in self.target_modules:
            if not fnmatch.filter(SUBLAYERS, pattern):
                close = difflib.get_close_matches(str(pattern), SUBLAYERS, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ConfigError(
                    f"adapter.target_modules: {pattern!r} matches no sublayer{hint} (a bottleneck adapter "
                    f"follows {' or '.join(SUBLAYERS)})"
                )
        matched = tuple(
            name for name in SUBLAYERS if any(fnmatch.fnmatch(name, p) for p in self.target_modules)
        )
        if not matched:
            raise ConfigError(f"adapter.target_modules is empty; give {' or '.join(SUBLAYERS)}, or both")
        return matched


def init(settings: Bottleneck, params: Any, key: jax.Array) -> Any:
    """Initializes an adapter to the identity: `down` uniform in +-1 / sqrt(D), all else zero.

    Args:
      settings: the sublayers that get an adapter, and its size.
      params: the base parameters, layers stacked; sharded over the current mesh, if there is one.
      key: a key from `jax.random.key`.

    Returns:
      `{"layers": {"attention": {"down": f32 [L, D, M], "down_bias": f32 [L, M], "up": f32 [L, M, D],
      "up_bias": f32 [L, D]}, ...}}`.

    Raises:
      InputError: if layers are not stacked.
    """
    layer_trees.require_stacked(params)
    layers, width = params["layers"]["attention_norm"]["scale"].shape
    bound, size = 1 / math.sqrt(width), settings.size
    adapter = {}
    for sublayer in settings.sublayers:
        sublayer_key = jax.random.fold_in(key, SUBLAYERS.index(sublayer))
        adapter[sublayer] = {
            "down": jax.random.uniform(sublayer_key, (layers, width, size), jnp.float32, -bound, bound),
            "down_bias": jnp.zeros((layers, size), jnp.float32),
            "up": jnp.zeros((layers, size, width), jnp.float32),
            "up_bias": jnp.zeros((layers, width), jnp.float32),
        }
    return _shard({"layers": adapter})


def attach(settings: Bottleneck, params: Any, adapter: Any) -> Any:
    """Inserts an adapter into the parameter tree: `bottleneck` in each adapted sublayer, `BottleneckWeights`.

    Args:
      settings: the adapter's settings.
      params: the base parameters, layers stacked or not.
      adapter: the tree of `init`, stacked.

    Raises:
      ConfigError: if the adapter's shapes do not match the base's.
    """
    check(params, adapter)
    adapter = _shard(adapter)

    def attach_layer(layer: Any, adapter: Any) -> Any:
        networks = {
            name: BottleneckWeights(**leaves, activation=settings.activation)
            for name, leaves in adapter.items()
        }
        return {**layer, **{name: {**layer[name], "bottleneck": net} for name, net in networks.items()}}

    return layer_trees.map_layers(attach_layer, params, adapter)


def split(params: Any) -> tuple[Any, Any]:
    """Splits attached parameters into the base and the adapter, which is stacked if the base is."""

    def split_layer(layer: Any) -> tuple[Any, Any]:
        base, adapter = dict(layer), {}
        for sublayer in SUBLAYERS:
            base[sublayer] = dict(layer[sublayer])
            if (network := base[sublayer].pop("bottleneck", None)) is not None:
                leaves = ("down", "down_bias", "up", "up_bias")
                adapter[sublayer] = {name: getattr(network, name) for name in leaves}
        return base, adapter

    return layer_trees.split_layers(split_layer, params)


def check(params: Any, adapter: Any) -> None:
    """Checks, from shapes alone, that an adapter fits the base parameters.

    Raises:
      ConfigError: naming the first sublayer that does not fit.
    """
    layer, count = layer_trees.first_layer(params)
    expected = (count, layer["attention_norm"]["scale"].shape[-1])
    for sublayer, leaves in adapter["layers"].items():
        found = leaves["down"].shape[:2]
        if found != expected:
            raise ConfigError(
                f"the adapter is for another model: its {sublayer} has {found[0]} layers of width {found[1]}"
                f", the base model {expected[0]} of {expected[1]}; use the base model it was trained on"
            )


def _shard(adapter: Any) -> Any:
    specs = {"down": sharding.BOTTLENECK_DOWN_DM, "up": sharding.BOTTLENECK_UP_MD}

    def constrain(leaves: Any) -> Any:
        return {name: sharding.constrain(x, P(None, *specs.get(name, (None,)))) for name, x in leaves.items()}

    return {"layers": {sublayer: constrain(leaves) for sublayer, leaves in adapter["layers"].items()}}
