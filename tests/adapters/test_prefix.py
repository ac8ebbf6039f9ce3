"""Prefix tuning: a prefix initialized from tokens equals those tokens in the input."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import adapters
from llama_jax.adapters import prefix
from llama_jax.errors import ConfigError, InputError
from tests.adapters.adapted import CONFIG, base_params, check_gradients_on_a_mesh, random_tokens

LENGTH = 5
SETTINGS = prefix.Prefix(LENGTH)
PREFIX_TOKENS = np.array([7, 91, 3, 120, 55], np.int32)
GREEDY = lj.Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def params():
    return base_params()


@pytest.fixture(scope="module")
def tokens():
    return random_tokens()


@pytest.fixture(scope="module")
def adapter(params):
    """A prefix initialized from PREFIX_TOKENS."""
    return prefix.init(SETTINGS, CONFIG, params, jax.random.key(0), PREFIX_TOKENS)


def prepend(tokens):
    return np.concatenate([np.broadcast_to(PREFIX_TOKENS, (len(tokens), LENGTH)), tokens], axis=1)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
@pytest.mark.parametrize("custom_vjp", [False, True])
def test_an_initialized_prefix_equals_its_tokens_in_the_input(backend, custom_vjp, params, tokens, adapter):
    attached = prefix.attach(SETTINGS, params, adapter)
    options = {"attention_backend": backend, "custom_vjp": custom_vjp}
    expected = lj.forward(CONFIG, params, prepend(tokens))[:, LENGTH:]
    np.testing.assert_allclose(lj.forward(CONFIG, attached, tokens, **options), expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_every_packed_document_attends_to_the_prefix(backend, params, tokens, adapter):
    attached = prefix.attach(SETTINGS, params, adapter)
    segments = np.array([1] * 5 + [2] * 4 + [0] * 3)[None].repeat(2, 0)
    positions = np.array([*range(5), *range(4), *range(3)])[None].repeat(2, 0)
    packed = lj.forward(CONFIG, attached, tokens[:2], positions, segments, attention_backend=backend)
    for start, stop in ((0, 5), (5, 9)):
        alone = lj.forward(CONFIG, params, prepend(tokens[:2, start:stop]))[:, LENGTH:]
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-5)


@pytest.fixture(scope="module")
def generated(params, adapter):
    """What follows a prompt of several prefill blocks and two short ones, with the prefix and its tokens."""
    config = CONFIG.replace(max_position_embeddings=1024)
    prompts = np.random.default_rng(5).integers(0, CONFIG.vocab_size, (3, 600)).astype(np.int32)
    attached = prefix.attach(SETTINGS, lj.unstack(params), adapter)
    lengths, options = np.array([600, 9, 4]), {"sampling": GREEDY, "max_new_tokens": 8}
    found = lj.generate(config, attached, prompts, lengths, jax.random.key(0), **options)
    plain = lj.generate(config, params, prepend(prompts), lengths + LENGTH, jax.random.key(0), **options)
    return jax.device_get((found, plain))


def test_generation_equals_generation_after_its_tokens(generated, params, tokens, adapter):
    found, plain = generated
    np.testing.assert_array_equal(found.tokens[1:], plain.tokens[1:])
    np.testing.assert_allclose(found.logprobs[1:], plain.logprobs[1:], atol=1e-5)
    attached, lengths = prefix.attach(SETTINGS, lj.unstack(params), adapter), np.array([12, 9, 4])
    beams = {"num_beams": 3, "max_new_tokens": 6}
    found = lj.beam_search(CONFIG, attached, tokens[:3], lengths, **beams)
    plain = lj.beam_search(CONFIG, params, prepend(tokens[:3]), lengths + LENGTH, **beams)
    np.testing.assert_array_equal(found.tokens, plain.tokens)


def test_prefill_in_blocks_attends_to_the_prefix(generated):
    found, plain = generated
    np.testing.assert_array_equal(found.tokens[0], plain.tokens[0])
    np.testing.assert_allclose(found.logprobs[0], plain.logprobs[0], atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "backend"), [("fsdp=4,tensor=2", "xla"), ("data=2,context=2,tensor=2", "blockwise")]
)
def test_gradients_on_a_mesh_equal_one_device(mesh, backend, params):
    check_gradients_on_a_mesh(SETTINGS, params, mesh, attention_backend=backend)


def test_init_on_a_mesh_equals_one_device(params, adapter):
    with jax.set_mesh(lj.make_mesh("data=2,fsdp=2,tensor=2")):
        sharded = lj.shard_params(params, jax.sharding.get_mesh(), CONFIG)
        found = prefix.init(SETTINGS, CONFIG, sharded, jax.random.key(0), PREFIX_TOKENS)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, adapter)


def test_split_is_the_inverse_of_attach(params, adapter):
    plain, found = prefix.split(prefix.attach(SETTINGS, params, adapter))
    jax.tree.map(np.testing.assert_array_equal, (plain, found), (params, adapter))
    plain, found = prefix.split(prefix.attach(SETTINGS, lj.unstack(params), adapter))
    jax.tree.map(np.testing.assert_array_equal, plain, lj.unstack(params))
    jax.tree.map(
        np.testing.assert_array_equal, found["layers"][1], jax.tree.map(lambda x: x[1], adapter["layers"])
    )


def test_quantized_base(params, tokens):
    quantized = lj.quantize(params, "nf4")
    attached = prefix.attach(
        SETTINGS, quantized, prefix.init(SETTINGS, CONFIG, quantized, jax.random.key(0), PREFIX_TOKENS)
    )
    expected = lj.forward(CONFIG, quantized, prepend(tokens))[:, LENGTH:]
    np.testing.assert_allclose(lj.forward(CONFIG, attached, tokens), expected, atol=1e-4)


def test_invalid_settings(params):
    for length in (0, 2.5, True):
        with pytest.raises(ConfigError, match=r"adapter\.prefix_length is"):
            prefix.Prefix(length)
    with pytest.raises(
        InputError, match=r"tokens has shape \[3\]; a prefix of length 5 is initialized from \[5\]"
    ):
        prefix.init(SETTINGS, CONFIG, params, jax.random.key(0), PREFIX_TOKENS[:3])
    with pytest.raises(InputError, match="stacked"):
        prefix.init(SETTINGS, CONFIG, lj.unstack(params), jax.random.key(0))


def test_prefix_for_another_model(params, adapter):
    other = base_params(CONFIG.replace(num_key_value_heads=1))
    with pytest.raises(
        ConfigError, match="another model: it has 2 layers of 2 key/value heads of 16, the base model 2 of 1"
    ):
        prefix.attach(SETTINGS, other, adapter)
    with pytest.raises(ConfigError, match="5 keys per layer, its settings 6"):
        prefix.attach(prefix.Prefix(6), params, adapter)


def test_splash_attention_rejects_a_prefix(params, tokens, adapter):
    with pytest.raises(ConfigError, match="'splash' takes no prefix; use 'blockwise'"):
        lj.forward(CONFIG, prefix.attach(SETTINGS, params, adapter), tokens, attention_backend="splash")


def test_a_prefix_cannot_be_merged(params, adapter):
    with pytest.raises(InputError, match="a prefix cannot be merged into weights"):
        adapters.merge(prefix.attach(SETTINGS, params, adapter))
