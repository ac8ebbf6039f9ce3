"""The tiles of `blockwise_attention`: blocks of queries and keys, whose index leads, and masks of pairs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

ANY_SEGMENT = -(2**31)  # the segment of keys that queries of all segments attend to
LAST = 2**31 - 1  # a position after all others


def split(x: jax.Array, axis: int, block: int, fill: int = 0) -> jax.Array:
    """[..., n, ...] -> [ceil(n / block), ..., block, ...]; the last block is padded with `fill`."""
    pad = -x.shape[axis] % block
    x = jnp.pad(x, [(0, pad if a == axis else 0) for a in range(x.ndim)], constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def join(blocks: jax.Array, axis: int, length: int) -> jax.Array:
    """The inverse of `split`, without the padding."""
    x = jnp.moveaxis(blocks, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return x[(*(slice(None),) * axis, slice(length))]


def tile_mask(q_ids: Any, k_ids: Any, window: int | None) -> jax.Array:
    """bool [M, 1, t, s]: which keys of a tile each query attends to."""
    causal, segments = k_ids[0][:, None, :] <= q_ids[0][:, :, None], k_ids[1][:, None, :]
    if window is not None:
        causal &= q_ids[0][:, :, None] - k_ids[0][:, None, :] < window
    return (causal & ((segments == q_ids[1][:, :, None]) | (segments == ANY_SEGMENT)))[:, None]


def near(window: int, queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks of one side, from the first to before the second result, with all tiles that are not masked.

    Args:
      window: the number of keys that a query attends to.
      queries: int [n, M, t], positions by block; or [1, M, t], those of one block.
      keys: int [1, M, s], those of one block; or [n, M, s].
    """
    oldest = lambda x: x.min((1, 2))  # noqa: E731
    newest = lambda x: x.max((1, 2))  # noqa: E731
    near = (newest(keys) > oldest(queries) - window) & (oldest(keys) <= newest(queries))
    index = jnp.arange(len(near))
    return jnp.where(near, index, len(near)).min(), jnp.where(near, index + 1, 0).max()


def take(blocks: Any, index: jax.Array) -> Any:
    """One block of each array of a tree."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), blocks)
