"""Attention in a sliding window over the mesh axis `context`: neighbors send the keys that it reaches.

Rows are in order: of T tokens, device i of C has those from i T / C on. Its queries read the keys of its own
tokens and of the `window - 1` before them, which are on the devices before it. Those alone are sent, where
gathering would send all others; in the backward pass their gradients go back the same way.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops import splash_attention
from llama_jax.ops.blockwise_attention import blockwise_attention
from llama_jax.ops.splash_tiles import BLOCK, LANES
from llama_jax.ops.zigzag import AXIS, shards

Backend = Literal["splash", "blockwise"]
_HEADS_BNTH = P(sharding.BATCH, "tensor", AXIS, None)
_BEFORE = -1  # the segment of what would be before the row


def received_keys(length: int, window: int, backend: Backend) -> int | None:
    """The number of keys that each device receives; None where it should gather all of them.

    Args:
      length: T.
      window: the number of keys up to its own that a query attends to.
      backend: the kernel; that of TPU divides keys into tiles.
    """
    count = shards()
    own = length // count
    tile = 1
    if backend == "splash":
        tile = math.gcd(own, BLOCK)
    if length % count or own % (LANES if backend == "splash" else 1):
        return None
    keys = -(-(window - 1) // tile) * tile
    return keys if keys < length - own else None


def window_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    window: int,
    backend: Backend,
    block_size: int = 512,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, causal in the order of the row, within segments and the window.

    Args:
      q: [B, T, N, H].
      k: [B, K, T, H], head-major; K divides N.
      v: [B, K, T, H].
      segment_ids: int [B, T]; a query attends only to keys of its own segment. None: each row is one segment.
      window: the number of keys up to its own that a query attends to, of which `received_keys` is not None.
      backend: the kernel for TPU, or the form for other platforms.
      block_size: the side of a `blockwise` tile.
      interpret: run the TPU's kernel in Pallas's interpret mode: slow, on any backend.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    reach = received_keys(q.shape[1], window, backend)
    assert reach is not None
    q = q.transpose(0, 2, 1, 3)
    attend = functools.partial(_blockwise, window=window, block_size=block_size)
    if backend == "splash":
        attend = functools.partial(_splash, window=window, interpret=interpret)
    ids = jnp.zeros((q.shape[0], q.shape[2]), jnp.int32) if segment_ids is None else segment_ids
    local = functools.partial(_local, attend, reach, shards())
    fit = functools.partial(sharding.restrict, names=sharding.explicit_axes())
    heads = fit(_HEADS_BNTH)
    in_specs = (heads, heads, heads, fit(sharding.TOKENS_BT))
    args = jax.tree.map(jax.sharding.reshard, (q, k, v, ids), in_specs)
    # The results of a Pallas kernel carry no varying axes, so shard_map cannot check them.
    out = jax.shard_map(local, in_specs=in_specs, out_specs=heads, check_vma=False)(*args)
    return out.transpose(0, 2, 1, 3)


def _local(attend: Any, reach: int, count: int, q: jax.Array, k: Any, v: Any, ids: jax.Array) -> jax.Array:
    """One device's queries, and its own keys after those of its neighbors."""
    receive = functools.partial(_receive, reach=reach, count=count)
    keys = receive(ids, axis=1)
    is_before = jnp.arange(keys.shape[1]) < reach - jax.lax.axis_index(AXIS) * ids.shape[1]
    return attend(q, receive(k, axis=2), receive(v, axis=2), ids, jnp.where(is_before, _BEFORE, keys))


def _receive(x: jax.Array, *, axis: int, reach: int, count: int) -> jax.Array:
    """x after its `reach` predecessors along `axis`, zeros where the row begins."""
    size, parts = x.shape[axis], [x]
    for step in range(1, -(-reach // size) + 1):
        wanted = min(reach - (step - 1) * size, size)
        sent = jax.lax.slice_in_dim(x, size - wanted, size, axis=axis)
        parts.insert(0, jax.lax.ppermute(sent, AXIS, [(i, i + step) for i in range(count - step)]))
    return jnp.concatenate(parts, axis)


def _blockwise(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    *,
    window: int,
    block_size: int,
) -> jax.Array:
    (batch, heads, keys, _), queries = k.shape, q.shape[2]
    order = jnp.broadcast_to(jnp.arange(keys, dtype=jnp.int32), (batch, keys))
    ids = (order[:, keys - queries :], q_ids), (order, k_ids)
    q_all, k_all = jax.tree.map(lambda x: jnp.repeat(x, heads, axis=0), ids)
    grouped = q.reshape(batch * heads, -1, *q.shape[2:])
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    return blockwise_attention(grouped, k, v, q_all, k_all, block_size=block_size, window=window).reshape(
        q.shape
    )


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: jax.Array,
    k_ids: jax.Array,
    *,
    window: int,
    interpret: bool,
) -> jax.Array:
    options = {"window": window, "offset": k.shape[2] - q.shape[2], "interpret": interpret}
    return splash_attention.on_one_device(
        tuple(options.items()), q.swapaxes(1, 2), k, v, q_ids, k_ids
    ).swapaxes(1, 2)
