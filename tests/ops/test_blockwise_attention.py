"""Blockwise attention beyond `test_attention.py`: meshes, bf16, masked tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import sharding
from llama_jax.attention import AttentionMask, attention
from llama_jax.meshes import make_mesh
from tests.test_attention import causal, inputs

LENGTH = 16
SEGMENTS = np.repeat([[0] * 5 + [1] * 11, [3] * 16, [1] * 15 + [2], [7] * 8 + [0] * 8], 2, axis=0)


def gradient(arguments, mask, backend, block=4):
    """Output and gradients of a weighted sum of it."""
    weight = np.random.default_rng(6).standard_normal(arguments[0].shape, np.float32)

    def total(q, k, v):
        out = attention(q, k, v, mask, backend=backend, block_size=block)
        return (weight * out.astype(jnp.float32)).sum(), out

    (_, out), grads = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*arguments)
    return out, *grads


@pytest.mark.parametrize("spec", ["fsdp=4,tensor=2", "fsdp=2,context=2,tensor=2", "context=8"])
def test_meshes_equal_one_device(spec):
    arguments = inputs(0, batch=8, length=LENGTH, heads=4, kv_heads=2)
    expected = gradient(arguments, causal(8, LENGTH, SEGMENTS), "xla")
    mesh = make_mesh(spec)
    with jax.set_mesh(mesh):
        specs = (sharding.ACT_BTNH, sharding.CACHE_BKSH, sharding.CACHE_BKSH)
        laid = [jax.device_put(a, sharding.named(mesh, s)) for a, s in zip(arguments, specs, strict=True)]
        at, segments = (
            jax.device_put(a, sharding.named(mesh, sharding.TOKENS_BT))
            for a in (np.broadcast_to(np.arange(LENGTH), (8, LENGTH)), SEGMENTS)
        )
        got = gradient(laid, AttentionMask(at, at, segments, segments), "blockwise")
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_bf16_gradients_are_as_accurate_as_autodiff():
    arguments = inputs(1, length=LENGTH)
    mask = causal(2, LENGTH, SEGMENTS[:2])
    exact = gradient(arguments, mask, "xla")
    half = [a.astype(jnp.bfloat16) for a in arguments]
    for ours, plain, exact_leaf in zip(
        gradient(half, mask, "blockwise"), gradient(half, mask, "xla"), exact, strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        error, usual = (np.linalg.norm(np.float32(x) - np.float32(exact_leaf)) for x in (ours, plain))
        assert error < 1.3 * usual + 1e-6


def test_masked_tiles_are_skipped():
    """A NaN in a masked tile reaches neither the output nor a gradient."""
    q, k, v = inputs(2, length=LENGTH)
    spoilt_k, spoilt_v = (np.where(np.arange(LENGTH)[:, None] < 8, x, np.nan).astype(x.dtype) for x in (k, v))
    weight = np.arange(LENGTH)[None, :, None, None] < 8  # the later queries read the later keys

    def total(q, k, v):
        out = attention(q, k, v, causal(2, LENGTH), backend="blockwise", block_size=4)
        return jnp.where(weight, out, 0).sum(), out

    run = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (_, clean), grads = jax.device_get(run(q, k, v))
    (_, out), spoilt = jax.device_get(run(q, spoilt_k, spoilt_v))
    np.testing.assert_array_equal(out[:, :8], clean[:, :8])
    assert np.isnan(out[:, 8:]).all()
    np.testing.assert_array_equal(spoilt[0][:, :8], grads[0][:, :8])


def test_tiles_of_other_segments_are_skipped():
    q, k, v = inputs(3, length=LENGTH)
    mask = causal(2, LENGTH, np.broadcast_to(np.arange(LENGTH) // 8, (2, LENGTH)))
    run = jax.jit(lambda k: attention(q, k, v, mask, backend="blockwise", block_size=4))
    expected = np.asarray(run(k))
    k[:, :, :8] = np.nan
    first = np.asarray(run(k))
    np.testing.assert_array_equal(first[:, 8:], expected[:, 8:])


@pytest.mark.parametrize(("length", "keys", "block"), [(3, 20, 8), (1, 5, 512), (20, 20, 3)])
def test_lengths_that_are_no_multiple_of_the_block(length, keys, block):
    q, k, v = inputs(4, length=length, keys=keys)
    at = np.broadcast_to(np.arange(keys - length, keys), (2, length))
    mask = AttentionMask(at, np.broadcast_to(np.arange(keys), (2, keys)))
    for ours, theirs in zip(
        gradient((q, k, v), mask, "blockwise", block), gradient((q, k, v), mask, "xla"), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)
