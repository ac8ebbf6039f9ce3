"""Stochastic rounding: what a gradient loses in one step, it keeps on average (arXiv 1502.02551)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import sharding


def round_stochastically(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """x rounded down or up to a number of `dtype`, with the probabilities that make the mean x.

    Args:
      x: f32, any shape, within the range of `dtype`.
      dtype: int8, float8_e4m3fn or float8_e5m2.
      key: from `jax.random.key`; 16 bits of it are used for each element.

    Returns:
      f32 of the same shape and sharding: numbers of `dtype`.
    """
    bits = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=sharding.spec_of(x))
    noise = (bits.astype(jnp.float32) + 0.5) / 2**16
    if dtype == jnp.int8:
        return jnp.floor(x + noise)
    info = jnp.finfo(dtype)
    # The distance of neighbors is that of the power of two below |x|, and of subnormal numbers the smallest.
    power = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000), jnp.float32
    )
    step = jnp.maximum(power, float(info.smallest_normal)) * 2.0**-info.nmant
    return jnp.floor(x / step + noise) * step
