"""What the attention kernels for TPU share: tiles, which of them a query reads, and masks."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

LANES = 128  # of a register
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # the score of a masked key
BLOCK = 512  # queries of a tile, and keys whose scores are computed at a time
VMEM_BYTES = 40 * 2**20

ROWS = (((1,), (1,)), ((), ()))  # x y^T
COLUMNS = (((1,), (0,)), ((), ()))  # x y


def columns(k: jax.Array, most: int, most_on_v4: int) -> int:
    """Into how many parts keys [B, K, S, H] are divided to fit into VMEM.

    Args:
      k: the keys.
      most: of heads of 128, that fit.
      most_on_v4: on TPU v4, whose cores have 16 MB of VMEM; asked of the current mesh, since a program may be
        compiled for another machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    on_v4 = device is not None and "v4" in device.device_kind
    return -(-k.shape[2] * -(-k.shape[3] // LANES) // (most_on_v4 if on_v4 else most))


def by_heads(x: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] as a kernel reads it, by rows of a key head's group: [B K, N / K, T, H].

    XLA lets the products beside attention write and read this layout. Blocks of [B, T, N H] need no
    transposition by name, but their tiles are others than those of [B, T, N, H]: copies, 1.6% of 7B's step.
    """
    batch, length, heads, size = x.shape
    return x.swapaxes(1, 2).reshape(batch * kv_heads, heads // kv_heads, length, size)


def from_heads(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `by_heads`, for [B, T, N, H] of this shape."""
    batch, length, heads, size = shape
    return x.reshape(batch, heads, length, size).swapaxes(1, 2)


def cost(
    q: jax.Array, k: jax.Array, products: int, *, causal: bool, window: int | None, offset: Any
) -> pl.CostEstimate:
    """What a kernel does with the scores that are not masked, for the compiler's schedule and for plans.

    Args:
      q: [B, T, N, H].
      k: [B, K, S, H].
      products: of scores or of their like, [T, S] by [S, H].
      causal, window, offset: as of the kernel; an offset that is not known yet is that of the middle.
    """
    (batch, queries, heads, size), keys = q.shape, k.shape[2]
    pairs = queries * keys
    if causal:
        first = offset if isinstance(offset, int) else (keys - queries) // 2
        ends = np.clip(first + 1 + np.arange(queries, dtype=np.int64), 0, keys)
        pairs = int(np.minimum(ends, window or keys).sum())
    scores = batch * heads * pairs
    return pl.CostEstimate(
        flops=2 * products * scores * size,
        transcendentals=scores,
        bytes_accessed=products * q.size * q.dtype.itemsize + 2 * k.size * k.dtype.itemsize,
    )


def over_read_blocks(
    add: Any, first: Any, block_q: int, block_k: int, blocks: int, *, causal: bool, window: int | None
) -> None:
    """Calls `add(key, masked)` in loops over the blocks of keys that some query of a tile reads.

    Args:
      add: adds the block that starts at `key`; `masked` if some query does not read some key of it.
      first: the place of the tile's first query among the keys; blocks before and after them may be read by
        none.
      block_q: queries of the tile.
      block_k: keys of a block.
      blocks: how many there are.
      causal: whether a query reads keys up to its own place; otherwise all.
      window: the number of keys up to its own that it reads, or None.
    """

    def block(at: Any) -> Any:  # with operations that count on no sign
        return jax.lax.div(jnp.clip(at, 0, blocks * block_k), block_k)

    def loop(low: Any, high: Any, masked: bool) -> None:
        jax.lax.fori_loop(low, high, lambda j, _: add(j * block_k, masked), None)

    if not causal:
        loop(0, blocks, masked=False)
        return
    low: Any = 0
    high, all_high = block(first + block_q + block_k - 1), block(first + 1)
    if window is not None:
        low = jnp.minimum(block(first + block_q - window + block_k - 1), high)
        all_high = jnp.maximum(all_high, low)
        loop(block(first - window + 1), low, masked=True)
    loop(low, all_high, masked=False)
    loop(all_high, high, masked=True)


def masked_scores(
    scores: jax.Array,
    query_axis: int,
    first: Any,
    key: Any,
    window: int | None,
    ids: tuple[Any, Any] | None,
    *,
    masked: bool,
) -> jax.Array:
    """Scores f32 of queries by keys, or of keys by queries, with `MASKED` where a query does not read a key.

    Args:
      scores: of a block.
      query_axis: the axis of queries.
      first: the place of the first query among the keys.
      key: the place of the first key.
      window: of keys, or None.
      ids: the segments of queries and of keys, which broadcast to the scores; None where there is one.
      masked: whether some are masked by their places.
    """
    masks = []
    if masked:
        query_at = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, query_axis)
        key_at = key + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - query_axis)
        masks.append(key_at <= query_at)
        if window is not None:
            masks.append(key_at > query_at - window)
    if ids is not None:
        masks.append(ids[0] == ids[1])
    return jnp.where(functools.reduce(jnp.logical_and, masks), scores, MASKED) if masks else scores
