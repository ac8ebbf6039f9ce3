"""Shared by the adapter tests: a small model, adapters with random values, and the gradient check."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

import llama_jax as lj
from llama_jax import adapters
from llama_jax.sharding import named
from tests.random_models import normal

CONFIG = lj.LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
DEFAULT_OPTIONS = lj.ForwardOptions()


@functools.cache
def base_params(config: lj.LlamaConfig = CONFIG) -> Any:
    """Parameters of the deviation of `lj.init`'s, with norms near 1."""
    shapes = jax.eval_shape(lambda: lj.init(config, jax.random.key(0)))
    return normal(0, shapes, 0.02, {"scale": 1.0})


def random_tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, CONFIG.vocab_size, (8, 12)).astype(np.int32)


def random_adapter(settings: adapters.Settings, params: Any, seed: int = 2) -> Any:
    """An adapter of random values; DoRA's magnitudes are near the base's norms."""
    shapes = jax.eval_shape(lambda params: adapters.init(settings, CONFIG, params, jax.random.key(0)), params)
    return normal(seed, shapes, 0.1, {"magnitude": 0.16})


def loss(
    adapter: Any,
    params: Any,
    tokens: jax.Array,
    settings: adapters.Settings,
    options: lj.ForwardOptions = DEFAULT_OPTIONS,
    merged: bool = False,
) -> jax.Array:
    attached = adapters.attach(settings, params, adapter)
    weights = adapters.merge(attached) if merged else attached
    return lj.next_token_loss(CONFIG, weights, tokens, options=options).total


# One jitted function, so that tests of the same settings share a compiled program.
value_and_grad = jax.jit(jax.value_and_grad(loss), static_argnames=("settings", "options", "merged"))


def assert_gradients_close(found: Any, expected: Any) -> None:
    """Within 2e-4 of each leaf's largest entry."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4 * np.abs(y).max() + 1e-6), found, expected
    )


def check_gradients_on_a_mesh(settings: adapters.Settings, params: Any, mesh: str, **options: Any) -> None:
    """The custom VJP on a mesh equals autodiff on one device; gradients are sharded as the adapter is."""
    adapter, tokens = random_adapter(settings, params), random_tokens()
    _, expected = value_and_grad(adapter, params, tokens, settings)
    devices = lj.make_mesh(mesh)
    with jax.set_mesh(devices):
        sharded = lj.shard_params(jax.device_get(params), devices, CONFIG)
        like = jax.eval_shape(lambda: adapters.init(settings, CONFIG, sharded, jax.random.key(0)))
        adapter = jax.tree.map(
            lambda x, y: jax.device_put(np.asarray(x), named(devices, y.sharding.spec)), adapter, like
        )
        _, found = value_and_grad(
            adapter, sharded, tokens, settings, lj.ForwardOptions(custom_vjp=True, **options)
        )
        assert all(jax.tree.leaves(jax.tree.map(lambda g, x: g.sharding == x.sharding, found, adapter)))
    assert_gradients_close(found, expected)
