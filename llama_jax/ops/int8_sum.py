"""A sum over a mesh axis in int8, with error feedback (arXiv 1901.09847; in two stages, arXiv 2102.02888)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from llama_jax.ops.eight_bit_operands import Operand, quantize

BLOCK = 256  # elements to a scale, f32
BYTES = 1 + 4 / BLOCK  # of an element


def sum_in_int8(x: jax.Array, residual: jax.Array, axis: str) -> tuple[jax.Array, jax.Array]:
    """Inside `shard_map`: the sum of x over a mesh axis, of which int8 alone crosses the axis.

    Each device sends every other a part of x + residual by an all-to-all, sums the part that it owns in f32,
    and all-gathers the sums: 2 (n - 1) / n bytes an element, a quarter of an f32 all-reduce. What either
    quantization left out becomes the residual, so that over many sums nothing is lost:

        sum over t of result_t = sum over t and devices of x_t - sum over devices of residual_T

    Where x is infinite or NaN, so is the result.

    Args:
      x: f32, this device's contribution.
      residual: as x, what this device's earlier contributions left out.
      axis: the mesh axis, over which both vary.

    Returns:
      The sum, the same on all devices of the axis, and the new residual.
    """
    size = jax.lax.axis_size(axis)
    full = x + residual
    parts = jnp.pad(full.reshape(-1), (0, -x.size % (size * BLOCK))).reshape(size, -1, BLOCK)
    sent = _quantize(parts)
    error = parts - _dequantize(sent)
    received = Operand(*(jax.lax.all_to_all(array, axis, 0, 0, tiled=True) for array in sent))
    own = _dequantize(received).sum(0)
    result = _quantize(own)
    # The error of a sum is fed back by the device that owns it.
    error = error.at[jax.lax.axis_index(axis)].add(own - _dequantize(result))
    total = _dequantize(Operand(*(jax.lax.all_gather(array, axis) for array in result)))
    sum_, error = (array.reshape(-1)[: x.size].reshape(x.shape) for array in (total, error))
    return sum_, error


def _quantize(blocks: jax.Array) -> Operand:
    """Int8 of blocks [..., BLOCK], with a scale for each; as arrays, into whose use XLA fuses no f32."""
    return jax.lax.optimization_barrier(quantize(blocks, (-1,), jnp.int8))


def _dequantize(blocks: Operand) -> jax.Array:
    return blocks.values.astype(jnp.float32) * blocks.scale
