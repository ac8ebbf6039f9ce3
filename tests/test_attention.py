"""Attention: grouping, masks, and blockwise = xla in value and gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import attention as attention_module
from llama_jax import kv_cache as kv
from llama_jax.attention import AttentionMask
from llama_jax.errors import ConfigError
from tests.optimized import optimized

# Eager calls would compile each operation by itself.
attention = jax.jit(attention_module.attention, static_argnames=("backend", "block_size"))


def inputs(seed, *, batch=2, length=13, keys=None, heads=6, kv_heads=3, head_dim=8, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    keys = length if keys is None else keys
    shapes = [(batch, length, heads, head_dim), *[(batch, kv_heads, keys, head_dim)] * 2]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def causal(batch, length, segments=None):
    positions = np.broadcast_to(np.arange(length), (batch, length))
    return AttentionMask(positions, positions, segments, segments)


@functools.partial(jax.jit, static_argnames=("backend", "block_size"))
def value_and_grads(weight, q, k, v, mask, backend="xla", block_size=4):
    total = lambda q, k, v: (weight * attention(q, k, v, mask, backend=backend, block_size=block_size)).sum()  # noqa: E731
    return jax.value_and_grad(total, (0, 1, 2))(q, k, v)


def numpy_attention(q, k, v, allowed):
    """softmax(q k^T / sqrt(H)) v in loops of numpy f64; allowed: bool [B, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, head_dim = q.shape
    out = np.zeros_like(q)
    for b in range(batch):
        for t in range(length):
            for n in range(heads):
                group = n // (heads // k.shape[1])
                scores = np.where(allowed[b, t], k[b, group] @ q[b, t, n] / np.sqrt(head_dim), -np.inf)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, group]
    return out


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
@pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
def test_equals_softmax_attention_for_every_grouping(backend, kv_heads):
    q, k, v = inputs(0, kv_heads=kv_heads)
    out = attention(q, k, v, causal(2, 13), backend=backend, block_size=4)
    allowed = np.tril(np.ones((2, 13, 13), bool))
    np.testing.assert_allclose(out, numpy_attention(q, k, v, allowed), atol=2e-6)


@pytest.mark.parametrize("heads", [4, 8])
def test_equal_heads_are_multi_head_and_one_is_multi_query(heads):
    """K = N is multi-head attention on repeated keys; K = 1 is the same with one repeated everymask."""
    q, k, v = inputs(1, heads=heads, kv_heads=1)
    mask = causal(2, 13)
    repeated = attention(q, np.repeat(k, heads, 1), np.repeat(v, heads, 1), mask)
    np.testing.assert_allclose(attention(q, k, v, mask), repeated, atol=1e-6)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_queries_attend_to_their_own_segment_only(backend):
    q, k, v = inputs(2)
    segments = np.array([[0] * 5 + [1] * 8, [3] * 13])
    out = attention(q, k, v, causal(2, 13, segments), backend=backend, block_size=4)
    alone = attention(q[:1, 5:], k[:1, :, 5:], v[:1, :, 5:], causal(1, 8), backend=backend, block_size=4)
    np.testing.assert_allclose(np.asarray(out)[0, 5:], np.asarray(alone)[0], atol=1e-6)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_later_keys_have_no_effect(backend):
    """As with a cache, which has more slots than there are queries."""
    q, k, v = inputs(3, length=3, keys=20)
    positions = np.array([[4, 5, 6], [9, 10, 11]])
    mask = AttentionMask(positions, np.broadcast_to(np.arange(20), (2, 20)))
    out = attention(q, k, v, mask, backend=backend, block_size=8)
    k[:, :, 12:] = v[:, :, 12:] = 1e4
    again = attention(q, k, v, mask, backend=backend, block_size=8)
    np.testing.assert_array_equal(out, again)


@pytest.mark.parametrize(
    ("length", "block", "packed"),
    [(13, 4, False), (13, 4, True), (16, 4, False), (16, 16, True), (5, 512, False), (17, 1, True)],
)
def test_blockwise_is_xla_in_value_and_gradient(length, block, packed):
    q, k, v = inputs(4, length=length)
    rng = np.random.default_rng(5)
    mask = causal(2, length, np.cumsum(rng.random((2, length)) < 0.2, axis=1) if packed else None)
    weight = rng.standard_normal(q.shape).astype(np.float32)
    value, grads = value_and_grads(weight, q, k, v, mask)
    block_value, block_grads = value_and_grads(weight, q, k, v, mask, "blockwise", block)
    np.testing.assert_allclose(block_value, value, rtol=1e-5)
    for got, expected in zip(block_grads, grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=5e-6)


def test_blockwise_gradients_are_those_of_finite_differences():
    q, k, v = inputs(7, batch=1, length=5, heads=2, kv_heads=1, head_dim=4)
    run = lambda q, k, v: attention(q, k, v, causal(1, 5), backend="blockwise", block_size=2)  # noqa: E731
    jax.test_util.check_grads(run, (q, k, v), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


def test_blockwise_has_no_array_of_all_scores():
    q, k, v = inputs(8, batch=1, length=512, heads=2, kv_heads=1)

    def compiled(backend):
        run = lambda q, k, v: attention(q, k, v, causal(1, 512), backend=backend, block_size=64).sum()  # noqa: E731
        return optimized(jax.jit(jax.grad(run, (0, 1, 2))).lower(q, k, v)).as_text()

    assert "512,512]" in compiled("xla")
    assert "512,512]" not in compiled("blockwise")


def test_bf16_output_is_close_to_f32():
    q, k, v = inputs(9, dtype=jnp.bfloat16)
    exact = attention(*(x.astype(np.float32) for x in (q, k, v)), causal(2, 13))
    for backend in ("xla", "blockwise"):
        out = attention(q, k, v, causal(2, 13), backend=backend, block_size=4)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(out), exact, atol=0.03)


def test_unknown_backend_is_an_error():
    with pytest.raises(ConfigError, match="'flash' is unknown; use one of xla, blockwise"):
        attention(*inputs(0), causal(2, 13), backend="flash")


def test_padding_has_no_segment_id_of_its_own():
    q, k, v = inputs(10)
    mask = causal(2, 13, np.full((2, 13), -2))
    out = attention(q, k, v, mask, backend="blockwise", block_size=4)
    np.testing.assert_allclose(out, attention(q, k, v, mask), atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_step_with_an_fp8_cache_needs_the_memory_of_one_with_int8(dtype):
    def temporary(cache_dtype):
        def step(cache, q, new, start):
            keys, values = kv.write(cache.k[0], new, start), kv.write(cache.v[0], new, start)
            mask = AttentionMask(start[:, None], jnp.broadcast_to(jnp.arange(256), (2, 256)))
            return attention_module.cached_attention(q, keys, values, mask), keys, values

        config = lj.presets.TINY.replace(num_hidden_layers=1)
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        array = jax.ShapeDtypeStruct
        q, new = (array((2, 1, heads, head_dim), dtype), array((2, kv_heads, 1, head_dim), dtype))
        cache = jax.eval_shape(lambda: kv.init_cache(config, 2, 256, cache_dtype))
        lowered = jax.jit(step, donate_argnums=0).lower(cache, q, new, array((2,), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporary("float8_e4m3fn") <= temporary("int8")
