"""Quantized weights: within half a step of the originals, and usable by every function of the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import meshes
from llama_jax.decoding.state import decode_loop
from llama_jax.errors import InputError
from llama_jax.kv_cache import init_cache
from llama_jax.model import forward_cached
from llama_jax.ops import quantization as q
from tests.optimized import optimized
from tests.random_models import random_model, random_prompts
from tests.uncached import assert_greedy

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


@pytest.mark.parametrize("bits", [4, 8])
def test_product_equals_that_of_the_dequantized_matrix(bits):
    """To 16 bits of the activations, with the integer product (up to 16 rows) as well."""
    weight, _ = matrix("w_down")
    got = quantized("w_down", weight, bits)
    x = np.random.default_rng(1).normal(size=(1, 17, 96)).astype(np.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(got.dequantize(), np.float64).T
    products = jax.jit(lambda x: {rows: got.product(x[:, :rows], None) for rows in (1, 3, 16, 17)})(x)
    for rows, product in products.items():
        np.testing.assert_allclose(product, expected[:, :rows], atol=3e-4 * np.abs(expected).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_matrices_are_dequantized_one_at_a_time(bits):
    """Prefill and decoding have one or two matrices in the compute dtype in memory, not all."""
    config, params = random_model(0, CONFIG.replace(num_hidden_layers=3))
    weights = jax.eval_shape(lambda params: lj.unstack(lj.quantize(params, bits)), params)
    tokens = np.zeros((1, 32), np.int32)
    cache = jax.eval_shape(lambda: init_cache(config, 1, 32, jnp.float32))
    read = jax.jit(
        lambda weights, cache: forward_cached(config, weights, tokens, np.zeros(1, np.int32), cache)[1]
    )
    whole = sum(leaf.size for leaf in jax.tree.leaves(params["layers"])) * 4
    assert optimized(read.lower(weights, cache)).memory_analysis().temp_size_in_bytes < whole / 3
    # The same in a loop over tokens.
    prompt, lengths = np.ones((1, 1), np.int32), np.ones(1, np.int32)
    state = jax.eval_shape(
        lambda weights: lj.prefill(config, weights, prompt, lengths, KEY, max_new_tokens=8), weights
    )
    write = jax.jit(lambda weights, state: decode_loop(config, weights, state, 8))
    assert optimized(write.lower(weights, state)).memory_analysis().temp_size_in_bytes < whole / 3


@pytest.mark.parametrize("bits", [4, 8])
def test_data_dependence_on_x_does_not_change_the_product(bits):
    weight = quantized("wq", matrix("wq")[0], bits)
    x = np.random.default_rng(2).normal(size=(3, 20, MATRICES["wq"][0][0])).astype(np.float32)
    run = jax.jit(lambda x: weight.product(x, None))
    whole = np.asarray(run(x))
    for number in (np.nan, -np.inf, -0.0):
        changed = x.copy()
        changed[0, 0, 0] = number
        other = np.asarray(run(changed))
        np.testing.assert_array_equal(other[:, 1:], whole[:, 1:])
        np.testing.assert_array_equal(other[1:], whole[1:])

    # Under `vmap` the matrix is not batched; x has a gradient.
    many = jax.make_jaxpr(jax.vmap(run))(np.stack([x] * 5))
    held = [var.aval.shape for var in all_of(many.jaxpr)]
    assert (5, *x.shape) in held and (5, *weight.values.shape) not in held
    batched, slope = jax.jit(lambda x: (jax.vmap(run)(x), jax.grad(lambda x: run(x).sum())(x[0])))(
        np.stack([x, 2 * x])
    )
    np.testing.assert_allclose(np.asarray(batched)[1], 2 * whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        np.asarray(slope)[0, 0], np.asarray(weight.dequantize()).sum(0), rtol=1e-4, atol=1e-4
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
    zeros, ones = (np.full((1, 2, 96), value, np.float32) for value in (0, 1))
    product = jax.jit(lambda weight, x: weight.product(x, None))
    assert not np.any(product(quantized("w_down", weight, 8), zeros))
    for bits in (4, 8):
        assert not np.any(product(quantized("w_down", 0 * weight, bits), ones))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_model_equals_that_with_dequantized_weights(bits, tied):
    """Forward and generate, stacked and not, tied and not."""
    config, params = random_model(int(tied), CONFIG.replace(tie_word_embeddings=tied))
    tokens, lengths = random_prompts(int(tied), config, [9, 4])
    small = lj.quantize(params, bits)
    standing = dequantized(small)
    expected = np.asarray(lj.forward(config, standing, tokens % config.vocab_size))
    got = lj.forward(config, small, tokens % config.vocab_size)
    np.testing.assert_allclose(got, expected, atol=2e-3 * float(np.abs(expected).max()))
    if (bits == 8) == tied:  # each number of bits and each kind of output once
        for form in (small, lj.unstack(small), lj.quantize(lj.unstack(params), bits)):
            out = lj.generate(config, form, tokens, lengths, KEY, GREEDY, max_new_tokens=6)
            assert_greedy(config, standing, tokens, lengths, out, atol=5e-3)


@jax.jit
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
    """A prompt of 3 tokens alone is read with the integer product, a batch with dequantized matrices."""
    config, params = random_model(1, CONFIG.replace(tie_word_embeddings=True))  # two rows as above
    small = lj.unstack(lj.quantize(params))
    tokens, lengths = random_prompts(3, config, [3, 17])
    together = lj.generate(config, small, tokens, lengths, KEY, GREEDY, max_new_tokens=8)
    for row in (0, 1):
        prompt = tokens[row : row + 1, : lengths[row]]
        alone = lj.generate(config, small, prompt, lengths[row : row + 1], KEY, GREEDY, max_new_tokens=8)
        np.testing.assert_array_equal(alone.tokens[0], np.asarray(together.tokens)[row])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_on_a_mesh_equals_one_device(bits):
    config, params = random_model(0, CONFIG.replace(intermediate_size=128, num_hidden_layers=1))
    tokens, lengths = random_prompts(0, config, [6, 3, 8, 5])
    mesh = meshes.make_mesh("fsdp=2,tensor=2", devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        small = lj.quantize(lj.shard_params(lj.unstack(jax.device_get(params)), mesh, config), bits)
        values = small["layers"][0]["feed_forward"]["w_up"].values
        assert values.addressable_shards[0].data.size < values.size
        out = lj.generate(config, small, tokens, lengths, KEY, GREEDY, max_new_tokens=5)
    assert_greedy(config, lj.quantize(params, bits), tokens, lengths, jax.device_get(out), atol=5e-3)


def test_invalid_arguments_are_errors():
    with pytest.raises(InputError, match="bits is 3; it must be 8, 4 or 'nf4'"):
        lj.quantize(PARAMS, 3)
    with pytest.raises(InputError, match="embedding is already quantized"):
        lj.quantize(lj.quantize(PARAMS))
    with pytest.raises(
        InputError, match="w_down has 40 inputs, not a multiple of 32; quantize to 8 bits instead"
    ):
        lj.quantize({"w_down": jnp.zeros((40, 8))}, 4)


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_the_gradient_of_an_int8_product_is_that_of_the_product(rows):
    """Up to 16 rows XLA:CPU multiplies in integers, whose rounding has no derivative."""
    key = jax.random.key(rows)
    weight = q.quantize({"w_gate": jax.random.normal(key, (32, 24))})["w_gate"]
    x = jax.random.normal(key, (1, rows, 32))
    found = jax.grad(lambda x: (weight.product(x, None) ** 2).sum())(x)
    expected = jax.grad(lambda x: ((x @ weight.dequantize().T) ** 2).sum())(x)
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
