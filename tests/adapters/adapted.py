"""A small model for tests of adapters; adapters away from where they begin; the law of their gradients."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import llama_jax as lj
from llama_jax import adapters

CONFIG = lj.LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def base() -> Any:
    return lj.init(CONFIG, jax.random.key(0))


def some_tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (8, 12), 0, CONFIG.vocab_size)


def trained(settings: adapters.Settings, params: Any, seed: int = 2) -> Any:
    """An adapter whose every leaf is away from where it began."""
    leaves, tree = jax.tree.flatten(adapters.init(settings, CONFIG, params, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten(
        [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def check_gradients_on_a_mesh(settings: adapters.Settings, params: Any, mesh: str, **how: Any) -> None:
    """The fast backward pass on a mesh gives autodiff's on one device, laid out as the adapter is."""
    adapter, tokens = trained(settings, params), some_tokens()

    def loss(adapter: Any, params: Any, **how: Any) -> jax.Array:
        attached = adapters.attach(settings, params, adapter)
        return lj.next_token_loss(CONFIG, attached, tokens, **how).total

    expected = jax.grad(loss)(adapter, params)
    with jax.set_mesh(lj.make_mesh(mesh)):
        laid = lj.shard_params(params, jax.sharding.get_mesh(), CONFIG)
        like = adapters.init(settings, CONFIG, laid, jax.random.key(0))
        own = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), adapter, like)
        found = jax.jit(lambda a: jax.grad(loss)(a, laid, custom_vjp=True, **how))(own)
        assert all(jax.tree.leaves(jax.tree.map(lambda g, x: g.sharding == x.sharding, found, own)))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4 * np.abs(y).max() + 1e-6), found, expected
    )
