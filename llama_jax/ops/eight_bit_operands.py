"""Operands of 8 bits with f32 scales, and their product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax.errors import ConfigError
from llama_jax.ops.rounding import round_stochastically

_SMALLEST = 1e-30  # of the largest elements: a row of zeros has a scale too
# Terms that int32 can sum, each at most 127 * 127.
_MAX_INT8_TERMS = (2**31 - 1) // 127**2


class Operand(NamedTuple):
    """values * scale, the operand of a product; dimensions that it contracts have size 1 in the scale."""

    values: jax.Array
    scale: jax.Array


def quantize(x: jax.Array, axes: Sequence[int], dtype: Any, key: jax.Array | None = None) -> Operand:
    """x in 8 bits, with a scale for all elements along `axes`.

    Where an element is infinite or NaN, the scale is, and so is the product.

    Args:
      x: any array.
      axes: the dimensions that the product contracts.
      dtype: int8, float8_e4m3fn or float8_e5m2.
      key: for stochastic rounding: up with the probability that makes the mean exact (to 2^-17 of a step).
    """
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    top = jnp.maximum(jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True), _SMALLEST)
    steps, scale = x * (largest / top), top / largest
    if key is not None:
        steps = jnp.clip(round_stochastically(steps, dtype, key), -largest, largest)
    elif dtype == jnp.int8:
        steps = jnp.round(steps)
    return Operand(steps.astype(dtype), scale)


def product(
    equation: str, a: Operand | jax.Array, b: Operand | jax.Array, out_sharding: P | None = None
) -> jax.Array:
    """einsum of two operands in f32.

    Args:
      equation: an einsum whose result has the other dimensions of a, then those of b, or first those of both.
      a, b: operands, or values without a scale.
      out_sharding: the partition spec of the result.

    XLA must not fuse quantizing into it: operands come out of an `optimization_barrier`.

    Raises:
      ConfigError: where int32 cannot sum the product.
    """
    operands, result = equation.split("->")
    left, right = operands.split(",")
    contracted = [letter for letter in left if letter not in result]
    dims = [left.index(letter) for letter in contracted], [right.index(letter) for letter in contracted]
    x, y = (operand.values if isinstance(operand, Operand) else operand for operand in (a, b))
    int8 = x.dtype == jnp.int8
    if int8 and (terms := math.prod(x.shape[axis] for axis in dims[0])) > _MAX_INT8_TERMS:
        raise ConfigError(
            f"an int8 product sums {terms:,} terms; int32 holds the sum of {_MAX_INT8_TERMS:,}: use more "
            "train.gradient_accumulation_steps, or fp8"
        )
    total = jax.lax.dot_general(
        x,
        y,
        (dims, ((), ())),
        preferred_element_type=jnp.int32 if int8 else jnp.float32,
        out_sharding=out_sharding,
    ).astype(jnp.float32)
    for letters, operand in ((left, a), (right, b)):
        if isinstance(operand, Operand):
            total = total * along(operand.scale, letters, result)
    # A scale may be sharded over axes of size 1 that the result is not sharded over.
    return total if out_sharding is None else jax.sharding.reshard(total, out_sharding)


def along(scale: jax.Array, letters: str, result: str) -> jax.Array:
    """A scale with dimensions `letters` for an array with dimensions `result`; others have size 1."""
    scale = jnp.squeeze(scale, tuple(i for i, letter in enumerate(letters) if letter not in result))
    return jnp.expand_dims(scale, tuple(i for i, letter in enumerate(result) if letter not in letters))
