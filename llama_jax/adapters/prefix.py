"""Prefix tuning as tree functions: init / attach / split (Li and Liang, arXiv 2101.00190).

In each layer P learned keys and values stand before those of the text, as if it had begun with P more tokens:
the text's own positions begin at P, and P fewer of the model's context are left. They belong to no row of a
key/value cache, and cannot be merged into weights. See `lora` for how adapters and parameters go together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import kv_cache as kv
from llama_jax import sharding
from llama_jax.adapters import layer_trees
from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError, InputError
from llama_jax.model import forward_cached, unstack


@dataclasses.dataclass(frozen=True)
class Prefix:
    """What a prefix looks like.

    Attributes:
      length: P, how many keys and values each layer has; Hugging Face's PEFT calls them virtual tokens.

    Raises:
      ConfigError: for a length that is no whole number of at least 1.
    """

    length: int = 16

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int) or self.length < 1:
            raise ConfigError(
                f"adapter.prefix_length is {self.length!r}; it must be a whole number, at least 1"
            )


def init(
    settings: Prefix, config: LlamaConfig, params: Any, key: jax.Array, tokens: jax.Array | None = None
) -> Any:
    """A prefix that is what the model makes of P tokens: it begins as that text would be read.

    Beginning with the keys and values of real words is what the paper found to train best (section 7.4).

    Args:
      settings: how long it is.
      config: the model.
      params: the base, layers stacked; laid out over the current mesh, if there is one.
      key: a key from `jax.random.key`, to draw the tokens with.
      tokens: int [P], the tokens to begin with instead of random ones.

    Returns:
      `{"layers": {"attention": {"k": f32 [L, K, P, H], "v": f32 [L, K, P, H]}}}`.

    Raises:
      InputError: if layers are not stacked, or tokens are not [P].
    """
    layer_trees.require_stacked(params)
    if tokens is None:
        tokens = jax.random.randint(key, (settings.length,), 0, config.vocab_size)
    if jnp.shape(tokens) != (settings.length,):
        raise InputError(
            f"tokens has shape {list(jnp.shape(tokens))}; a prefix of {settings.length} begins with "
            f"[{settings.length}]"
        )
    return _laid_out(_read(config, params, jnp.asarray(tokens, jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _read(config: LlamaConfig, params: Any, tokens: jax.Array) -> Any:
    """The keys and values of tokens [P] in every layer, as they stand in a cache."""
    # A row for every device that rows are split over.
    rows = math.prod(sharding.explicit_axes().get(axis, 1) for axis in sharding.BATCH)
    params = unstack(params)
    tokens = jnp.broadcast_to(tokens, (rows, tokens.shape[0]))
    cache = kv.init_cache(config, rows, tokens.shape[1], params["embed"]["embedding"].dtype)
    _, cache = forward_cached(config, params, tokens, jnp.zeros(rows, jnp.int32), cache)

    def first_row(layers: Any) -> jax.Array:
        whole = P(None, *sharding.PREFIX_KPH)
        return jnp.stack([sharding.constrain(x, whole)[0] for x in layers]).astype(jnp.float32)

    return {"layers": {"attention": {"k": first_row(cache.k), "v": first_row(cache.v)}}}


def attach(settings: Prefix, params: Any, adapter: Any) -> Any:
    """The parameters with a prefix in each layer's attention.

    Args:
      settings: what the prefix was made with.
      params: the base, stacked or not.
      adapter: the tree of `init`, stacked.

    Raises:
      ConfigError: if the prefix's shapes are not those of this base, or of these settings.
    """
    check(params, adapter)
    adapter = _laid_out(adapter)
    found = adapter["layers"]["attention"]["k"].shape[2]
    if found != settings.length:
        raise ConfigError(f"the prefix has {found} keys a layer, its settings say {settings.length}")

    def put(layer: Any, own: Any) -> Any:
        return {**layer, "attention": {**layer["attention"], "prefix": own["attention"]}}

    return layer_trees.put(params, adapter, put)


def split(params: Any) -> tuple[Any, Any]:
    """Takes attached parameters apart: the base, and the prefix with its layers as the base's are."""

    def apart(layer: Any) -> tuple[Any, Any]:
        rest = dict(layer["attention"])
        prefix = rest.pop("prefix", None)
        return {**layer, "attention": rest}, {} if prefix is None else {"attention": prefix}

    return layer_trees.take(params, apart)


def check(params: Any, adapter: Any) -> None:
    """Checks by shapes alone that a prefix belongs to a base.

    Raises:
      ConfigError: if it does not.
    """
    layer, count = layer_trees.first_layer(params)
    want = (count, *layer["attention"]["wk"].shape[-2:])
    shape = adapter["layers"]["attention"]["k"].shape
    found = (shape[0], shape[1], shape[3])
    if found != want:
        raise ConfigError(
            f"the prefix is for another model: it has {found[0]} layers of {found[1]} key/value heads of "
            f"{found[2]}, the base {want[0]} of {want[1]} of {want[2]}; give its own base"
        )


def _laid_out(adapter: Any) -> Any:
    spec = P(None, *sharding.PREFIX_KPH)
    return jax.tree.map(lambda x: sharding.constrain(x, spec), adapter)
