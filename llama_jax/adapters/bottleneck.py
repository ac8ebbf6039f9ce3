"""Bottleneck adapters as tree functions: init / attach / split (Houlsby et al., arXiv 1902.00751).

A small network stands behind each layer's attention, feed-forward network, or both: y + up f(down y). It is
not linear, so there is no `merge`. See `lora` for how adapters and parameters go together.
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
from llama_jax.ops.adapted import Activation, Network

PARTS = ("attention", "feed_forward")  # behind which a network may stand


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """What an adapter looks like.

    Attributes:
      size: M, the width of each network's middle.
      target_modules: patterns of `attention` and `feed_forward`, behind which a network stands; both by default, as
        in the paper.
      activation: what f is; `silu` by default, as in the model itself.

    Raises:
      ConfigError: for a size that cannot work, an unknown activation, or a pattern that matches nothing.
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
        _ = self.parts

    @property
    def parts(self) -> tuple[str, ...]:
        """Behind which parts of a layer a network stands.

        Raises:
          ConfigError: for a pattern that matches none.
        """
        for pattern in self.target_modules:
            if not fnmatch.filter(PARTS, pattern):
                close = difflib.get_close_matches(str(pattern), PARTS, n=1)
                meant = f"; did you mean {close[0]}?" if close else ""
                raise ConfigError(
                    f"adapter.target_modules: {pattern!r} matches no part of a layer{meant} (a bottleneck "
                    f"stands behind {' or '.join(PARTS)})"
                )
        chosen = tuple(part for part in PARTS if any(fnmatch.fnmatch(part, p) for p in self.target_modules))
        if not chosen:
            raise ConfigError(f"adapter.target_modules is empty; give {' or '.join(PARTS)}, or both")
        return chosen


def init(settings: Bottleneck, params: Any, key: jax.Array) -> Any:
    """An adapter that changes nothing yet: `down` uniform in +-1 / sqrt(D), all else zero.

    Args:
      settings: where networks stand, and how wide they are.
      params: the base, layers stacked; laid out over the current mesh, if there is one.
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
    made = {}
    for part in settings.parts:
        own = jax.random.fold_in(key, PARTS.index(part))
        made[part] = {
            "down": jax.random.uniform(own, (layers, width, size), jnp.float32, -bound, bound),
            "down_bias": jnp.zeros((layers, size), jnp.float32),
            "up": jnp.zeros((layers, size, width), jnp.float32),
            "up_bias": jnp.zeros((layers, width), jnp.float32),
        }
    return _laid_out({"layers": made})


def attach(settings: Bottleneck, params: Any, adapter: Any) -> Any:
    """The parameters with an adapter, a `Network` in each layer's part that has one.

    Args:
      settings: what the adapter was made with.
      params: the base, stacked or not.
      adapter: the tree of `init`, stacked.

    Raises:
      ConfigError: if the adapter's shapes are not those of this base.
    """
    check(params, adapter)
    adapter = _laid_out(adapter)

    def put(layer: Any, own: Any) -> Any:
        networks = {part: Network(**leaf, activation=settings.activation) for part, leaf in own.items()}
        return {**layer, **{part: {**layer[part], "bottleneck": net} for part, net in networks.items()}}

    return layer_trees.put(params, adapter, put)


def split(params: Any) -> tuple[Any, Any]:
    """Takes attached parameters apart: the base, and the adapter with its layers as the base's are."""

    def apart(layer: Any) -> tuple[Any, Any]:
        base, own = dict(layer), {}
        for part in PARTS:
            if (network := layer[part].get("bottleneck")) is not None:
                base[part] = {name: leaf for name, leaf in layer[part].items() if name != "bottleneck"}
                own[part] = {name: getattr(network, name) for name in ("down", "down_bias", "up", "up_bias")}
        return base, own

    return layer_trees.take(params, apart)


def check(params: Any, adapter: Any) -> None:
    """Checks by shapes alone that an adapter belongs to a base.

    Raises:
      ConfigError: naming the first part that does not fit.
    """
    layer, count = layer_trees.first_layer(params)
    want = (count, layer["attention_norm"]["scale"].shape[-1])
    for part, leaf in adapter["layers"].items():
        found = leaf["down"].shape[:2]
        if found != want:
            raise ConfigError(
                f"the adapter is for another model: behind {part} it has {found[0]} layers of width "
                f"{found[1]}, the base {want[0]} of {want[1]}; give its own base"
            )


def _laid_out(adapter: Any) -> Any:
    specs = {"down": sharding.BOTTLENECK_DOWN_DM, "up": sharding.BOTTLENECK_UP_MD}

    def lay(leaf: Any) -> Any:
        return {name: sharding.constrain(x, P(None, *specs.get(name, (None,)))) for name, x in leaf.items()}

    return {"layers": {part: lay(leaf) for part, leaf in adapter["layers"].items()}}
