"""Embedding look-up with a custom backward pass, on the sharded table."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops import spmd


def embed_custom_vjp(table: jax.Array, tokens: jax.Array, *, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`layers.embed` with a custom backward pass.

    The table is gathered in `dtype`, and its gradient is summed in f32.

    Args:
      table: [V, D].
      tokens: int [B, T].
      dtype: the compute dtype.

    Returns:
      [B, T, D] in `dtype`; NaN for an id outside the vocabulary.
    """
    return _embed(jnp.dtype(dtype), *spmd.pvary_all(table, tokens))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _embed(dtype: jnp.dtype, table: jax.Array, tokens: jax.Array) -> jax.Array:
    axes = sharding.explicit_axes()

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        rows = table.at[_local_ids(table.shape[0], tokens, axes)]
        if "tensor" not in axes:
            return rows.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        found = rows.get(mode="fill", fill_value=0, wrap_negative_indices=False)
        if "tensor" in sharding.axes_of(out_spec[1]):
            return jax.lax.psum_scatter(found, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(found, "tensor")

    # One device casts only the rows that it reads; several gather the whole table, so they cast it first.
    table = sharding.gather(table.astype(dtype), sharding.EMBEDDING_VD) if axes else table
    in_specs = (P("tensor", None), sharding.TOKENS_BT)
    out_spec = sharding.out_sharding(sharding.ACT_BTD, (*tokens.shape, 0)) or P()
    return spmd.shard_map_or_call(local, in_specs, out_spec)(table, tokens).astype(dtype)


def _embed_forward(dtype: jnp.dtype, table: jax.Array, tokens: jax.Array) -> Any:
    return _embed(dtype, table, tokens), (table, tokens)


def _embed_backward(dtype: jnp.dtype, residuals: Any, d_out: jax.Array) -> Any:
    table, tokens = residuals
    axes = sharding.explicit_axes()
    vocab_size = table.shape[0] // axes.get("tensor", 1)

    def local(d_out: jax.Array, tokens: jax.Array) -> jax.Array:
        d_out, tokens = spmd.pvary_all(d_out, tokens)
        d_table = spmd.pvary_like(jnp.zeros((vocab_size, d_out.shape[-1]), jnp.float32), d_out)
        rows = d_table.at[_local_ids(vocab_size, tokens, axes)]
        d_table = rows.add(d_out.astype(jnp.float32), mode="drop", wrap_negative_indices=False)
        return spmd.reduce_scatter_grad(d_table, 1, axes)

    in_specs = (sharding.GATHERED_BTD, sharding.TOKENS_BT)
    d_table = spmd.shard_map_or_call(local, in_specs, sharding.EMBEDDING_VD)(d_out, tokens)
    return d_table.astype(table.dtype), None


_embed.defvjp(_embed_forward, _embed_backward)


def _local_ids(vocab_size: int, tokens: jax.Array, axes: Mapping[str, int]) -> jax.Array:
    """Ids as rows of this device's shard of the table; outside its range where another device has the row."""
    return tokens - jax.lax.axis_index("tensor") * vocab_size if "tensor" in axes else tokens
