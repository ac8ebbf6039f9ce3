"""Prefix tuning: a prefix made of tokens is those tokens read first, wherever attention is computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import adapters
from llama_jax.adapters import prefix
from llama_jax.errors import ConfigError, InputError
from tests.adapters.adapted import CONFIG, base, check_gradients_on_a_mesh, some_tokens

LENGTH = 5
SETTINGS = prefix.Prefix(LENGTH)
FIRST = jnp.array([7, 91, 3, 120, 55])
GREEDY = lj.Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def params():
    return base()


@pytest.fixture(scope="module")
def tokens():
    return some_tokens()


@pytest.fixture(scope="module")
def read(params):
    """A prefix that begins as FIRST."""
    return prefix.init(SETTINGS, CONFIG, params, jax.random.key(0), FIRST)


def after_first(tokens):
    return jnp.concatenate([jnp.broadcast_to(FIRST, (len(tokens), LENGTH)), tokens], axis=1)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
@pytest.mark.parametrize("custom_vjp", [False, True])
def test_a_new_prefix_is_its_tokens_read_first(backend, custom_vjp, params, tokens, read):
    attached = prefix.attach(SETTINGS, params, read)
    how = {"attention_backend": backend, "custom_vjp": custom_vjp}
    expected = lj.forward(CONFIG, params, after_first(tokens))[:, LENGTH:]
    np.testing.assert_allclose(lj.forward(CONFIG, attached, tokens, **how), expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_every_packed_document_sees_it(backend, params, tokens, read):
    attached = prefix.attach(SETTINGS, params, read)
    segments = jnp.array([1] * 5 + [2] * 4 + [0] * 3)[None].repeat(2, 0)
    positions = jnp.array([*range(5), *range(4), *range(3)])[None].repeat(2, 0)
    packed = lj.forward(CONFIG, attached, tokens[:2], positions, segments, attention_backend=backend)
    for start, stop in ((0, 5), (5, 9)):
        alone = lj.forward(CONFIG, params, after_first(tokens[:2, start:stop]))[:, LENGTH:]
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-5)


def test_generating_from_it_is_generating_after_its_tokens(params, tokens, read):
    attached = prefix.attach(SETTINGS, lj.unstack(params), read)
    lengths = jnp.array([12, 9, 4])
    ask = {"sampling": GREEDY, "max_new_tokens": 8}
    found = lj.generate(CONFIG, attached, tokens[:3], lengths, jax.random.key(0), **ask)
    plain = lj.generate(CONFIG, params, after_first(tokens[:3]), lengths + LENGTH, jax.random.key(0), **ask)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-5)
    beams = {"num_beams": 3, "max_new_tokens": 6}
    found = lj.beam_search(CONFIG, attached, tokens[:3], lengths, **beams)
    plain = lj.beam_search(CONFIG, params, after_first(tokens[:3]), lengths + LENGTH, **beams)
    np.testing.assert_array_equal(found.tokens, plain.tokens)


def test_a_long_prompt_read_in_blocks_sees_it(params, read):
    config = CONFIG.replace(max_position_embeddings=1024)
    long = jax.random.randint(jax.random.key(5), (1, 600), 0, CONFIG.vocab_size)
    attached = prefix.attach(SETTINGS, lj.unstack(params), read)
    ask = {"sampling": GREEDY, "max_new_tokens": 4}
    found = lj.generate(config, attached, long, jnp.array([600]), jax.random.key(0), **ask)
    plain = lj.generate(config, params, after_first(long), jnp.array([605]), jax.random.key(0), **ask)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=1e-5)


@pytest.mark.parametrize("mesh", ["fsdp=4,tensor=2", "data=2,context=2,tensor=2"])
@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_gradients_on_a_mesh_are_those_of_one_device(mesh, backend, params):
    check_gradients_on_a_mesh(SETTINGS, params, mesh, attention_backend=backend)


def test_on_a_mesh_it_begins_the_same(params, read):
    with jax.set_mesh(lj.make_mesh("data=2,fsdp=2,tensor=2")):
        laid = lj.shard_params(params, jax.sharding.get_mesh(), CONFIG)
        found = prefix.init(SETTINGS, CONFIG, laid, jax.random.key(0), FIRST)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, read)


def test_split_takes_apart_what_attach_put_together(params, read):
    plain, found = prefix.split(prefix.attach(SETTINGS, params, read))
    jax.tree.map(np.testing.assert_array_equal, (plain, found), (params, read))
    plain, found = prefix.split(prefix.attach(SETTINGS, lj.unstack(params), read))
    jax.tree.map(np.testing.assert_array_equal, plain, lj.unstack(params))
    jax.tree.map(
        np.testing.assert_array_equal, found["layers"][1], jax.tree.map(lambda x: x[1], read["layers"])
    )


@pytest.mark.parametrize("bits", [8, "nf4"])
def test_a_quantised_base_takes_one(bits, params, tokens):
    held = lj.quantize(params, bits)
    attached = prefix.attach(SETTINGS, held, prefix.init(SETTINGS, CONFIG, held, jax.random.key(0), FIRST))
    expected = lj.forward(CONFIG, held, after_first(tokens))[:, LENGTH:]
    np.testing.assert_allclose(lj.forward(CONFIG, attached, tokens), expected, atol=1e-4)


def test_settings_that_cannot_work(params):
    for length in (0, 2.5, True):
        with pytest.raises(ConfigError, match=r"adapter\.prefix_length is"):
            prefix.Prefix(length)
    with pytest.raises(InputError, match=r"tokens has shape \[3\]; a prefix of 5 begins with \[5\]"):
        prefix.init(SETTINGS, CONFIG, params, jax.random.key(0), FIRST[:3])
    with pytest.raises(InputError, match="stacked"):
        prefix.init(SETTINGS, CONFIG, lj.unstack(params), jax.random.key(0))


def test_a_prefix_for_another_model(params, read):
    other = lj.init(CONFIG.replace(num_key_value_heads=1), jax.random.key(0))
    with pytest.raises(
        ConfigError, match="another model: it has 2 layers of 2 key/value heads of 16, the base 2 of 1"
    ):
        prefix.attach(SETTINGS, other, read)
    with pytest.raises(ConfigError, match="5 keys a layer, its settings say 6"):
        prefix.attach(prefix.Prefix(6), params, read)


def test_splash_takes_none(params, tokens, read):
    with pytest.raises(ConfigError, match="'splash' takes no prefix; use 'blockwise'"):
        lj.forward(CONFIG, prefix.attach(SETTINGS, params, read), tokens, attention_backend="splash")


def test_it_cannot_be_merged(params, read):
    with pytest.raises(InputError, match="a prefix cannot be merged into weights"):
        adapters.merge(prefix.attach(SETTINGS, params, read))
