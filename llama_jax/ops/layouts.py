"""Memory layouts, fusion boundaries and in-place updates, in the form that each platform's compiler needs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from llama_jax import sharding


def row_major(x: jax.Array) -> jax.Array:
    """x with its last dimension fastest in memory on TPU; x elsewhere.

    Work-around for XLA:TPU (JAX 0.12.0.1), which otherwise transposes the residual stream in every scanned
    layer. Other platforms do not partition the layout constraint: it would gather x from all devices.
    """

    def constrained(x: jax.Array) -> jax.Array:
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    return jax.lax.platform_dependent(x, tpu=constrained, default=lambda x: x)


@jax.custom_vjp
def materialize_cotangent(x: jax.Array) -> jax.Array:
    """x; its cotangent is written to memory before it is used.

    Work-around for XLA:TPU (JAX 0.12.0.1), which otherwise fuses the products that compute the cotangent with
    the backward pass of whatever computed x.
    """
    return x


materialize_cotangent.defvjp(
    lambda x: (x, None), lambda _, cotangent: (jax.lax.optimization_barrier(cotangent),)
)


def fp8_bits(x: jax.Array) -> jax.Array:
    """x as float8_e4m3fn, in uint8.

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1), which writes to an array of fp8 by converting all of it to
    float16 and back.
    """
    return jax.lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)


def fp8_numbers(bits: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What `fp8_bits` stored, in `dtype`."""
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(dtype)


def write_slices(array: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes `new` [B, K, T, ...] into `array` [B, K, S, ...] from slot start[b] on, for each batch row b.

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1): with batch size 1 the update has a single index, and XLA
    fuses it with the attention that reads the result, in copies of the whole array. One index per head keeps
    it a scatter, which runs in place.
    """

    def update(row: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=1)

    def index_per_head(array: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        starts = jnp.broadcast_to(start, array.shape[1])
        return jax.vmap(update, in_axes=(1, 1, 0), out_axes=1)(array, new, starts)

    index_per_row = jax.vmap(update)
    if len(array) > 1 or sharding.explicit_axes():
        return index_per_row(array, new, start)
    return jax.lax.platform_dependent(array, new, start, cpu=index_per_head, default=index_per_row)
