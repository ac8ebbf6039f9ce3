"""Shared by the adapter tests: a small model, adapters with random values, and the gradient check."""

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


def base_params() -> Any:
    return lj.init(CONFIG, jax.random.key(0))


def random_tokens() -> jax.Array:
    return jax.random.randint(jax.random.key(1), (8, 12), 0, CONFIG.vocab_size)


def random_adapter(settings: adapters.Settings, params: Any, seed: int = 2) -> Any:
    """An initialized adapter plus noise on every leaf."""
    leaves, tree = jax.tree.flatten(adapters.init(settings, CONFIG, params, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten(
        [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def check_gradients_on_a_mesh(settings: adapters.Settings, params: Any, mesh: str, **options: Any) -> None:
    """The custom VJP on a mesh equals autodiff on one device; gradients are sharded as the adapter is."""
    adapter, tokens = random_adapter(settings, params), random_tokens()

    def loss(adapter: Any, params: Any, **options: Any) -> jax.Array:
        attached = adapters.attach(settings, params, adapter)
        return lj.next_token_loss(CONFIG, attached, tokens, **options).total

    expected = jax.grad(loss)(adapter, params)
    with jax.set_mesh(lj.make_mesh(mesh)):
        sharded = lj.shard_params(params, jax.sharding.get_mesh(), CONFIG)
        like = adapters.init(settings, CONFIG, sharded, jax.random.key(0))
        adapter = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), adapter, like)
        found = jax.jit(lambda a: jax.grad(loss)(a, sharded, custom_vjp=True, **options))(adapter)
        assert all(jax.tree.leaves(jax.tree.map(lambda g, x: g.sharding == x.sharding, found, adapter)))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4 * np.abs(y).max() + 1e-6), found, expected
    )
