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

    `array` may have more rows, which are left as they are.

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1): with batch size 1 the update has a single index, and XLA
    fuses it with the attention that reads the result, in copies of the whole array. One index per head keeps
    it a scatter, which runs in place.
    """

    def update(row: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=1)

    def index_per_head(array: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
        starts = jnp.broadcast_to(start, array.shape[1])
        return jax.vmap(update, in_axes=(1, 1, 0), out_axes=1)(array, new, starts)

    if len(array) > len(new):
        return _write_first_rows(array, new, start)
    index_per_row = jax.vmap(update)
    if len(array) > 1 or sharding.explicit_axes():
        return index_per_row(array, new, start)
    return jax.lax.platform_dependent(array, new, start, cpu=index_per_head, default=index_per_row)


def slice_slots(array: jax.Array, rows: int, start: jax.Array, size: int) -> jax.Array:
    """array[:rows, :, start : start + size] of [B, K, S, ...], in one slice: two would copy all slots."""
    if len(array) == rows:
        return jax.lax.dynamic_slice_in_dim(array, start, size, 2)
    zero = jnp.zeros_like(start)
    at = zero, zero, start, *(zero for _ in array.shape[3:])
    return jax.lax.dynamic_slice(array, at, (rows, array.shape[1], size, *array.shape[3:]))


def _write_first_rows(array: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`write_slices` into the first rows of a larger array, with one index per head as it has."""
    rows, heads, length, *rest = new.shape
    row, head = (x.reshape(-1) for x in jnp.meshgrid(jnp.arange(rows), jnp.arange(heads), indexing="ij"))
    indices = jnp.stack([row, head, jnp.repeat(start, heads)], axis=1)
    windows = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, 2 + len(rest))),
        inserted_window_dims=(0, 1),
        scatter_dims_to_operand_dims=(0, 1, 2),
    )
    return jax.lax.scatter(
        array,
        indices.astype(jnp.int32),
        new.reshape(rows * heads, length, *rest),
        windows,
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.CLIP,
    )
