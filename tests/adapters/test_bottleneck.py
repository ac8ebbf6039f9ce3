"""Bottleneck adapters: initialization is the identity; gradients on a mesh equal those of one device."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import adapters
from llama_jax.adapters import bottleneck
from llama_jax.errors import ConfigError, InputError
from llama_jax.ops import linear
from llama_jax.ops.adapted import BottleneckWeights
from tests.adapters.adapted import (
    CONFIG,
    base_params,
    check_gradients_on_a_mesh,
    random_adapter,
    random_tokens,
)

KINDS = {
    "houlsby": bottleneck.Bottleneck(8),
    "pfeiffer": bottleneck.Bottleneck(4, target_modules=("feed_*",), activation="relu"),
    "gelu": bottleneck.Bottleneck(4, target_modules=("attention",), activation="gelu"),
}


@pytest.fixture(scope="module")
def params():
    return base_params()


@pytest.fixture(scope="module")
def tokens():
    return random_tokens()


@pytest.mark.parametrize("kind", KINDS)
def test_an_initialized_adapter_is_the_identity(kind, params, tokens):
    attached = bottleneck.attach(KINDS[kind], params, bottleneck.init(KINDS[kind], params, jax.random.key(0)))
    np.testing.assert_array_equal(lj.forward(CONFIG, attached, tokens), lj.forward(CONFIG, params, tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_pass_matches_the_paper(kind):
    settings = KINDS[kind]
    rng = np.random.default_rng(0)
    sizes = {
        "down": (64, settings.size),
        "down_bias": settings.size,
        "up": (settings.size, 64),
        "up_bias": 64,
    }
    leaves = {name: np.float32(rng.standard_normal(size)) for name, size in sizes.items()}
    y = np.float32(rng.standard_normal((2, 3, 64)))
    found = linear.apply_bottleneck(BottleneckWeights(**leaves, activation=settings.activation), y)
    pre_activation = y @ leaves["down"] + leaves["down_bias"]
    hidden = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "relu": lambda x: np.maximum(x, 0),
        "gelu": lambda x: x * 0.5 * (1 + jax.lax.erf(x / np.sqrt(2))),
    }[settings.activation](pre_activation)
    np.testing.assert_allclose(found, y + hidden @ leaves["up"] + leaves["up_bias"], rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_split_is_the_inverse_of_attach(kind, params):
    adapter = random_adapter(KINDS[kind], params)
    plain, found = bottleneck.split(bottleneck.attach(KINDS[kind], params, adapter))
    jax.tree.map(np.testing.assert_array_equal, (plain, found), (params, adapter))
    plain, found = bottleneck.split(bottleneck.attach(KINDS[kind], lj.unstack(params), adapter))
    jax.tree.map(np.testing.assert_array_equal, plain, lj.unstack(params))
    jax.tree.map(
        np.testing.assert_array_equal, found["layers"][1], jax.tree.map(lambda x: x[1], adapter["layers"])
    )


def test_unstacked_equals_stacked_and_cached_equals_uncached(params, tokens):
    settings = KINDS["houlsby"]
    adapter = random_adapter(settings, params)
    stacked = bottleneck.attach(settings, params, adapter)
    expected = lj.forward(CONFIG, stacked, tokens)
    assert np.abs(expected - lj.forward(CONFIG, params, tokens)).max() > 0.01
    unstacked = bottleneck.attach(settings, lj.unstack(params), adapter)
    np.testing.assert_allclose(lj.forward(CONFIG, unstacked, tokens), expected, atol=1e-5)
    greedy = lj.generate(
        CONFIG,
        unstacked,
        tokens[:2],
        np.array([12, 9]),
        jax.random.key(0),
        lj.Sampling(temperature=0.0),
        max_new_tokens=6,
    )
    text = np.concatenate([tokens[:1], greedy.tokens[:1]], axis=1)
    logits = np.asarray(lj.forward(CONFIG, stacked, text))
    np.testing.assert_array_equal(logits[:, 11:-1].argmax(-1), greedy.tokens[:1])


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [
        ("houlsby", "data=2,context=2,tensor=2"),
        ("pfeiffer", "fsdp=4,tensor=2"),
        ("gelu", "fsdp=4,tensor=2"),
    ],
)
def test_gradients_on_a_mesh_equal_one_device(kind, mesh, params):
    check_gradients_on_a_mesh(KINDS[kind], params, mesh)


def test_quantized_base(params, tokens):
    quantized = lj.quantize(params, 8)
    adapter = bottleneck.init(KINDS["houlsby"], quantized, jax.random.key(0))
    attached = bottleneck.attach(KINDS["houlsby"], quantized, adapter)
    np.testing.assert_array_equal(lj.forward(CONFIG, attached, tokens), lj.forward(CONFIG, quantized, tokens))


def test_invalid_settings():
    with pytest.raises(ConfigError, match=r"adapter\.bottleneck_size is 0"):
        bottleneck.Bottleneck(0)
    with pytest.raises(ConfigError, match=r"'atention' matches no sublayer; did you mean attention\?"):
        bottleneck.Bottleneck(target_modules=("atention",))
    with pytest.raises(ConfigError, match="empty"):
        bottleneck.Bottleneck(target_modules=())
    with pytest.raises(ConfigError, match="activation 'tanh' is unknown; use one of silu, gelu, relu"):
        bottleneck.Bottleneck(activation="tanh")


def test_adapter_for_another_model(params):
    adapter = random_adapter(KINDS["houlsby"], base_params(CONFIG.replace(num_hidden_layers=3)))
    with pytest.raises(
        ConfigError, match="another model: its attention has 3 layers of width 64, the base model 2"
    ):
        bottleneck.attach(KINDS["houlsby"], params, adapter)


def test_init_needs_stacked_layers(params):
    with pytest.raises(InputError, match="stacked"):
        bottleneck.init(KINDS["houlsby"], lj.unstack(params), jax.random.key(0))


def test_a_bottleneck_cannot_be_merged(params):
    adapter = random_adapter(KINDS["houlsby"], params)
    with pytest.raises(InputError, match="a bottleneck cannot be merged into weights"):
        adapters.merge(bottleneck.attach(KINDS["houlsby"], params, adapter))
