"""Quantized weights: within half a step of the originals, and usable by every function of the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import sharding
from llama_jax.decoding.state import decode_loop
from llama_jax.errors import InputError
from llama_jax.kv_cache import init_cache
from llama_jax.model import forward_cached
from llama_jax.ops import quantization as q
from tests.random_models import random_model, random_prompts

CONFIG, PARAMS = random_model(0, lj.presets.TINY)
KEY = jax.random.key(0)
GREEDY = lj.Sampling(temperature=0.0)
MATRICES = {
    "wq": ((64, 4, 16), (0,)),
    "wo": ((4, 16, 96), (0, 1)),
    "w_down": ((96, 64), (0,)),
    "kernel": ((64, 50), (0,)),
}


def matrix(name, seed=0):
    shape, contracted = MATRICES[name]
    weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    outputs = [axis for axis in range(len(shape)) if axis not in contracted]
    flat = weight.transpose(*outputs, *contracted).reshape(int(np.prod([shape[a] for a in outputs])), -1)
    return weight, flat


def quantized(name, weight, bits):
    return q.quantize({name: jnp.asarray(weight)}, bits)[name]


@pytest.mark.parametrize("name", list(MATRICES))
def test_8_bits_are_within_half_a_step_of_the_weights(name):
    weight, flat = matrix(name)
    got = quantized(name, weight, 8)
    step = np.abs(flat).max(1, keepdims=True) / 127
    assert got.shape == weight.shape and got.values.dtype == jnp.int8
    assert (np.abs(np.asarray(got.dequantize()) - flat) <= step / 2 * 1.001).all()


@pytest.mark.parametrize("name", ["wq", "wo", "w_down"])
def test_4_bits_are_within_half_a_step_of_their_groups(name):
    weight, flat = matrix(name)
    got = quantized(name, weight, 4)
    groups = flat.reshape(flat.shape[0], -1, q.GROUP_SIZE)
    step = (groups.max(-1) - groups.min(-1))[..., None] / 15
    error = np.abs(np.asarray(got.dequantize()).reshape(groups.shape) - groups)
    assert (error <= step / 2 + 0.003).all()  # f16's rounding of the scale, 15 times over
    assert got.nbytes == flat.size * 5 // 8


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["wq", "wo", "w_down"])
def test_quantization_is_idempotent(name, bits):
    """Values that are representable are not changed."""
    weight, _ = matrix(name)
    once = quantized(name, weight, bits)
    shape, contracted = MATRICES[name]
    outputs = [axis for axis in range(len(shape)) if axis not in contracted]
    back = np.asarray(once.dequantize()).reshape([shape[a] for a in (*outputs, *contracted)])
    back = back.transpose(np.argsort([*outputs, *contracted]))
    twice = quantized(name, back, bits)
    np.testing.assert_allclose(
        twice.dequantize(), once.dequantize(), rtol=0, atol=2e-3 if bits == 4 else 1e-6
    )


@pytest.mark.parametrize("rows", [1, 3, 16, 17])
@pytest.mark.parametrize("bits", [4, 8])
def test_product_equals_that_of_the_dequantized_matrix(bits, rows):
    """To 16 bits of the activations, with the integer product (up to 16 rows) as well."""
    weight, _ = matrix("w_down")
    got = quantized("w_down", weight, bits)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, rows, 96)), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(got.dequantize(), np.float64).T
    np.testing.assert_allclose(got.product(x, None), expected, atol=3e-4 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_are_dequantized_one_at_a_time(bits):
    """Prefill and decoding have one or two matrices in the compute dtype in memory, not all."""
    config, params = random_model(0, CONFIG.replace(num_hidden_layers=12))
    weights = lj.unstack(lj.quantize(params, bits))
    tokens, cache = jnp.zeros((1, 32), jnp.int32), init_cache(config, 1, 32, jnp.float32)
    read = jax.jit(
        lambda weights, cache: forward_cached(config, weights, tokens, jnp.zeros(1, int), cache)[1]
    )
    whole = sum(leaf.size for leaf in jax.tree.leaves(params["layers"])) * 4
    assert read.lower(weights, cache).compile().memory_analysis().temp_size_in_bytes < whole / 3
    # The same in a loop over tokens.
    state = lj.prefill(config, weights, *(jnp.ones(n, int) for n in ((1, 1), 1)), KEY, max_new_tokens=8)
    write = jax.jit(lambda weights, state: decode_loop(config, weights, state, 8))
    assert write.lower(weights, state).compile().memory_analysis().temp_size_in_bytes < whole / 3


@pytest.mark.parametrize("bits", [4, 8])
def test_data_dependence_on_x_does_not_change_the_product(bits):
    weight = quantized("wq", matrix("wq")[0], bits)
    x = jax.random.normal(KEY, (3, 20, MATRICES["wq"][0][0]))
    run = jax.jit(lambda x: weight.product(x, None))
    whole = run(x)
    for number in (jnp.nan, -jnp.inf, -0.0):
        other = run(x.at[0, 0, 0].set(number))
        np.testing.assert_array_equal(other[:, 1:], whole[:, 1:])
        np.testing.assert_array_equal(other[1:], whole[1:])

    # Under `vmap` the matrix is not batched; x has a gradient.
    many = jax.make_jaxpr(jax.vmap(run))(jnp.stack([x] * 5))
    held = [var.aval.shape for var in all_of(many.jaxpr)]
    assert (5, *x.shape) in held and (5, *weight.values.shape) not in held
    np.testing.assert_allclose(jax.vmap(run)(jnp.stack([x, 2 * x]))[1], 2 * whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        jax.grad(lambda x: run(x).sum())(x)[0, 0], weight.dequantize().sum(0), rtol=1e-4, atol=1e-4
    )


def all_of(jaxpr):
    """Every variable of a jaxpr, including those of inner jaxprs."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from all_of(inner)


def test_zeros_stay_zero():
    weight, _ = matrix("w_down")
    x = jnp.zeros((1, 2, 96))
    assert not np.any(quantized("w_down", weight, 8).product(x, None))
    for bits in (4, 8):
        assert not np.any(quantized("w_down", 0 * weight, bits).product(x + 1, None))


@pytest.mark.parametrize("bits", [4, 8])
def test_model_equals_that_with_dequantized_weights(bits):
    """Forward and generate, stacked and not, tied and not."""
    for seed in (0, 1):
        config = lj.presets.TINY.replace(tie_word_embeddings=bool(seed))
        _, params = random_model(seed, config)
        tokens, lengths = random_prompts(seed, config, [9, 4])
        small = lj.quantize(params, bits)
        standing = dequantized(small)
        expected = lj.forward(config, standing, tokens % config.vocab_size)
        got = lj.forward(config, small, tokens % config.vocab_size)
        np.testing.assert_allclose(got, expected, atol=2e-3 * float(jnp.abs(expected).max()))
        settings = {"max_new_tokens": 6}
        expected = lj.generate(config, standing, tokens, lengths, KEY, GREEDY, **settings)
        for form in (small, lj.unstack(small), lj.quantize(lj.unstack(params), bits)):
            out = lj.generate(config, form, tokens, lengths, KEY, GREEDY, **settings)
            np.testing.assert_array_equal(out.tokens, expected.tokens)
            np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=5e-3)


def dequantized(tree):
    """Dequantized matrices of a tree, in their original shapes."""

    def back(leaf):
        if not isinstance(leaf, q.Quantized):
            return leaf
        outputs = [axis for axis in range(len(leaf.shape)) if axis not in leaf.contracted]
        order = (*outputs, *leaf.contracted)

        def one(leaf):
            flat = leaf.dequantize().reshape([leaf.shape[axis] for axis in order])
            return flat.transpose(np.argsort(order))

        return jax.vmap(one)(leaf) if leaf.scale.ndim == 3 else one(leaf)

    return jax.tree.map(back, tree, is_leaf=lambda leaf: isinstance(leaf, q.Quantized))


def test_batch_row_equals_the_row_alone():
    small = lj.unstack(lj.quantize(PARAMS))
    tokens, lengths = random_prompts(3, CONFIG, [3, 17, 9])
    together = lj.generate(CONFIG, small, tokens, lengths, KEY, GREEDY, max_new_tokens=8)
    for row in range(3):
        prompt = tokens[row : row + 1, : lengths[row]]
        alone = lj.generate(CONFIG, small, prompt, lengths[row : row + 1], KEY, GREEDY, max_new_tokens=8)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_on_a_mesh_equals_one_device(bits):
    config, params = random_model(0, lj.presets.TINY.replace(intermediate_size=128, num_hidden_layers=1))
    tokens, lengths = random_prompts(0, config, [6, 3, 8, 5])
    expected = lj.generate(
        config, lj.quantize(lj.unstack(params), bits), tokens, lengths, KEY, GREEDY, max_new_tokens=5
    )
    mesh = sharding.make_mesh("fsdp=2,tensor=2", devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        small = lj.quantize(lj.unstack(lj.shard_params(params, mesh, config)), bits)
        values = small["layers"][0]["feed_forward"]["w_up"].values
        assert values.addressable_shards[0].data.size < values.size
        out = lj.generate(config, small, tokens, lengths, KEY, GREEDY, max_new_tokens=5)
    np.testing.assert_array_equal(out.tokens, expected.tokens)


def test_invalid_arguments_are_errors():
    with pytest.raises(InputError, match="bits is 3; it must be 8, 4 or 'nf4'"):
        lj.quantize(PARAMS, 3)
    with pytest.raises(InputError, match="embedding is already quantized"):
        lj.quantize(lj.quantize(PARAMS))
    with pytest.raises(
        InputError, match="w_down has 40 inputs, not a multiple of 32; quantize to 8 bits instead"
    ):
        lj.quantize({"w_down": jnp.zeros((40, 8))}, 4)
