"""Rotary embedding: a rotation, relative in position, and its scaling rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.rope import rotary, rotary_frequencies, rotate

CONFIG = lj.presets.TINY


def rotated(x, position, config=CONFIG):
    """x [H] at a position."""
    table = rotary(config, jnp.full((1, 1), position))
    return rotate(x[None, None, None], table)[0, 0, 0]


def test_scores_depend_only_on_relative_position():
    q, k = jax.random.normal(jax.random.key(0), (2, CONFIG.head_dim))
    np.testing.assert_allclose(jnp.linalg.norm(rotated(q, 17)), jnp.linalg.norm(q), rtol=1e-6)
    np.testing.assert_allclose(rotated(q, 0), q, rtol=1e-6)
    np.testing.assert_allclose(rotated(q, 20) @ rotated(k, 13), rotated(q, 107) @ rotated(k, 100), rtol=1e-4)


def test_equals_complex_multiplication():
    """Meta's reference form: pairs as complex numbers, times exp(i m theta_j)."""
    x = np.asarray(jax.random.normal(jax.random.key(1), (CONFIG.head_dim,)))
    half = CONFIG.head_dim // 2
    angle = 5 * 10_000.0 ** (-np.arange(half) / half)
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    np.testing.assert_allclose(rotated(jnp.asarray(x), 5), np.r_[pairs.real, pairs.imag], atol=1e-6)


def test_bf16_is_rotated_in_f32():
    x = jax.random.normal(jax.random.key(2), (1, 3, 2, 16), jnp.bfloat16)
    table = rotary(CONFIG.replace(head_dim=16), jnp.array([[1, 500, 4000]]))
    exact = rotate(x.astype(jnp.float32), table)
    out = rotate(x, table)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


def frequencies(scaling, head_dim=64, theta=10_000.0):
    return rotary_frequencies(head_dim=head_dim, theta=theta, scaling=scaling)


PLAIN, _ = frequencies(None)


def test_linear_divides_frequencies():
    scaled, factor = frequencies(lj.RopeScaling("linear", 4.0))
    np.testing.assert_allclose(scaled, PLAIN / 4, rtol=1e-6)
    assert factor == 1.0


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest():
    scaled, _ = frequencies(lj.RopeScaling("ntk", 4.0))
    np.testing.assert_allclose(scaled[0], PLAIN[0])
    np.testing.assert_allclose(scaled[-1], PLAIN[-1] / 4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_yarn_and_llama3_keep_high_frequencies_and_divide_low_ones(kind):
    scaled, factor = frequencies(lj.RopeScaling(kind, 8.0, original_max_position_embeddings=4096))
    np.testing.assert_allclose(scaled[:5], PLAIN[:5], rtol=1e-6)
    np.testing.assert_allclose(scaled[-4:], PLAIN[-4:] / 8, rtol=1e-6)
    assert np.all(np.diff(scaled) < 0)
    assert factor == pytest.approx(0.1 * np.log(8) + 1 if kind == "yarn" else 1.0)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_factor_1_has_no_effect(kind):
    scaled, factor = frequencies(lj.RopeScaling(kind, 1.0, original_max_position_embeddings=128))
    np.testing.assert_allclose(scaled, PLAIN, rtol=1e-6)
    assert factor == 1.0
