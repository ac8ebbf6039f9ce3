"""Prefix tuning as tree functions: init / attach / split (Li and Liang, arXiv 2101.00190).

Each layer's attention has P learned keys and values before those of the input, as if the input had P more
tokens at the start: its positions begin at P, and the context is P tokens shorter. They are parameters, not
part of the key/value cache, and cannot be merged into weights. See `lora` for how adapters and parameters fit
together.
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
from llama_jax.ops import striped_cache


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Settings of a prefix.

    Attributes:
      length: P, the number of learned keys and values per layer; PEFT's `num_virtual_tokens`.

    Raises:
      ConfigError: if the length is not an integer of at least 1.
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
    """Initializes a prefix with the keys and values that the model computes for P tokens.

    The paper found that the activations of real words are the best initialization (section 7.4).

    Args:
      settings: the prefix length.
      config: the model's configuration.
      params: the base parameters, layers stacked; sharded over the current mesh, if there is one.
      key: a key from `jax.random.key`, to sample the tokens with.
      tokens: int [P], the tokens to use instead of random ones.

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
            f"tokens has shape {list(jnp.shape(tokens))}; a prefix of length {settings.length} is "
            f"initialized from [{settings.length}]"
        )
    return _shard(_compute_kv(config, params, jnp.asarray(tokens, jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _compute_kv(config: LlamaConfig, params: Any, tokens: jax.Array) -> Any:
    """The rotated keys and the values of tokens [P] in every layer, as in a key/value cache."""
    # The batch has to divide over the mesh's batch axes, so the same row is repeated over all of them.
    batch = math.prod(sharding.explicit_axes().get(axis, 1) for axis in sharding.BATCH)
    params = unstack(params)
    length = tokens.shape[0]
    tokens = jnp.broadcast_to(tokens, (batch, length))
    dtype = params["embed"]["embedding"].dtype
    cache = kv.init_cache(config, batch, length, dtype, run_length=None)
    _, cache = forward_cached(config, params, tokens, jnp.zeros(batch, jnp.int32), cache)

    def first_row(layers: Any) -> jax.Array:
        spec = P(None, *sharding.PREFIX_KPH)
        ordered = (striped_cache.in_order(x, length) for x in layers)
        return jnp.stack([sharding.constrain(x, spec)[0] for x in ordered]).astype(jnp.float32)

    return {"layers": {"attention": {"k": first_row(cache.k), "v": first_row(cache.v)}}}


def attach(settings: Prefix, params: Any, adapter: Any) -> Any:
    """Inserts a prefix into the parameter tree, under `prefix` in each layer's attention.

    Args:
      settings: the prefix's settings.
      params: the base parameters, layers stacked or not.
      adapter: the tree of `init`, stacked.

    Raises:
      ConfigError: if the prefix's shapes do not match the base's, or these settings.
    """
    check(params, adapter)
    adapter = _shard(adapter)
    found = adapter["layers"]["attention"]["k"].shape[2]
    if found != settings.length:
        raise ConfigError(
            f"the prefix has {found} keys per layer, its settings {settings.length}; make both the same"
        )

    def attach_layer(layer: Any, adapter: Any) -> Any:
        return {**layer, "attention": {**layer["attention"], "prefix": adapter["attention"]}}

    return layer_trees.map_layers(attach_layer, params, adapter)


def split(params: Any) -> tuple[Any, Any]:
    """Splits attached parameters into the base and the prefix, which is stacked if the base is."""

    def split_layer(layer: Any) -> tuple[Any, Any]:
        attention = dict(layer["attention"])
        prefix = attention.pop("prefix", None)
        return {**layer, "attention": attention}, {} if prefix is None else {"attention": prefix}

    return layer_trees.split_layers(split_layer, params)


def check(params: Any, adapter: Any) -> None:
    """Checks, from shapes alone, that a prefix fits the base parameters.

    Raises:
      ConfigError: if it does not.
    """
    layer, count = layer_trees.first_layer(params)
    expected = (count, *layer["attention"]["wk"].shape[-2:])
    shape = adapter["layers"]["attention"]["k"].shape
    found = (shape[0], shape[1], shape[3])
    if found != expected:
        raise ConfigError(
            f"the prefix is for another model: it has {found[0]} layers of {found[1]} key/value heads of "
            f"{found[2]}, the base model {expected[0]} of {expected[1]} of {expected[2]}; use the base model "
            "it was trained on"
        )


def _shard(adapter: Any) -> Any:
    spec = P(None, *sharding.PREFIX_KPH)
    return jax.tree.map(lambda x: sharding.constrain(x, spec), adapter)
