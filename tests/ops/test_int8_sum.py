"""Sums over a mesh axis in int8: near the sum, and over many sums nothing is lost."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llama_jax.ops.int8_sum import BLOCK, sum_in_int8

SHAPE = (7, 150)  # neither the blocks nor the parts divide it


def draw(seed: int, parts: int) -> np.ndarray:
    """Contributions [parts, ...] whose blocks are of very different sizes."""
    rng = np.random.default_rng(seed)
    scale = np.exp(2 * rng.normal(size=(SHAPE[0], 1)))
    return (rng.normal(size=(parts, *SHAPE)) * scale).astype(np.float32)


@functools.cache
def program(parts: int):
    """(x [parts, ...], residual [parts, ...]) -> (the sum of each device [parts, ...], residual)."""
    mesh = Mesh(np.array(jax.devices()[:parts]), ("data",))

    def local(x: jax.Array, residual: jax.Array):
        total, residual = sum_in_int8(x[0], residual[0], "data")
        return total[None], residual[None]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    return jax.jit(mapped)


def blocks(x: np.ndarray) -> np.ndarray:
    """The largest value of each block, at each of its elements."""
    flat = np.pad(np.abs(x).reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    return np.repeat(flat.max(1), BLOCK)[: x.size].reshape(x.shape)


@pytest.mark.parametrize("parts", [2, 8])
def test_the_sum_is_within_half_a_step_of_each_quantization(parts):
    x = draw(0, parts)
    totals, residual = jax.device_get(program(parts)(x, np.zeros_like(x)))
    assert (totals == totals[0]).all()  # bit for bit, as parameters must stay the same everywhere
    half_steps = sum(blocks(part) for part in x) + blocks(x.sum(0)) * 1.01
    assert (np.abs(totals[0] - x.sum(0)) <= half_steps * 0.501 / 127).all()
    np.testing.assert_allclose(totals[0] + residual.sum(0), x.sum(0), atol=1e-5 * np.abs(x).max())


def test_what_is_left_out_of_a_sum_is_in_the_next():
    """The mean of many sums nears the mean of what was summed; without the residual it does not."""
    parts, steps = 4, 60
    fixed = draw(1, parts)
    fixed[:, :, ::3] *= 1e-3  # less than half a step of their blocks: on their own they would never be sent
    residual, without = np.zeros_like(fixed), np.zeros_like(fixed)
    found, lost, exact, largest = np.zeros(SHAPE), np.zeros(SHAPE), np.zeros(SHAPE), []
    for step in range(steps):
        x = fixed + 0.1 * draw(2 + step, parts)
        totals, residual = jax.device_get(program(parts)(x, residual))
        found, exact = found + totals[0], exact + x.sum(0, dtype=np.float64)
        lost = lost + jax.device_get(program(parts)(x, without)[0])[0]
        largest.append(np.abs(residual).max())
    np.testing.assert_allclose(found + residual.sum(0), exact, atol=3e-4 * np.abs(fixed).max())
    assert max(largest[steps // 2 :]) <= 1.5 * max(largest[: steps // 2])
    errors = [np.abs(total / steps - exact / steps)[:, ::3].mean() for total in (found, lost)]
    assert errors[0] < errors[1] / 5


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(value):
    x = draw(0, 2)
    x[1, 3, 5] = value
    totals, _ = jax.device_get(program(2)(x, np.zeros_like(x)))
    assert not np.isfinite(totals[0][3, 5])
