"""A key/value cache whose slots are striped over the mesh axis `context`: writes, and attention to it.

Of `context` devices, device d holds slots d, d + context, d + 2 context, ...: consecutive slots are on
consecutive devices, so that a text of any length is divided evenly, and every chunk of a prompt too. A device
writes and reads its own slots only. Its softmax is a partial one, and the partial results are merged over
`context` by their maxima and sums; keys and values never leave their device.

In the global array [B, K, S, ...] the slots of device d are those from d * S / context on. Positions and
masks are in the order of the slots.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops import spmd
from llama_jax.ops.layouts import write_slices

# Of the queries [B, K, G, T, H], not yet normalized: the maximum of the scores and the sum of the weights,
# f32 [B, K, G, T], and the sum of the weighted values, f32 [B, K, G, T, H].
Partial = tuple[jax.Array, jax.Array, jax.Array]


def shards() -> int:
    """The number of devices that the slots of a row are striped over: the size of `context`, or 1."""
    return sharding.explicit_axes().get("context", 1)


def write(tree: Any, new: Any, start: jax.Array) -> Any:
    """`layouts.write_slices` into striped arrays.

    Args:
      tree: arrays [B, K, S, ...], sharded by `sharding.STRIPED_BKSH`.
      new: as many arrays [B, K, T, ...].
      start: int [B], the first slot to write in each row, from 0 to S - T; a single token at -1, as of a row
        that was added to a batch, is not written.
    """

    def local(tree: Any, new: Any, start: jax.Array) -> Any:
        return jax.tree.map(functools.partial(_write, start), tree, new)

    slots = jax.tree.map(_fit_slots, tree)
    specs = slots, jax.tree.map(_fit_new, new), _fit_rows(start)
    return spmd.shard_map_or_call(local, specs, slots)(tree, new, start)


def _write(start: jax.Array, array: jax.Array, new: jax.Array) -> jax.Array:
    """Writes those of `new` [B, K, T, ...] that belong to this device's slots [B, K, S / context, ...]."""
    device, stride = jax.lax.axis_index("context"), jax.lax.axis_size("context")
    length, slots = new.shape[2], array.shape[2]
    count = -(-length // stride)  # T tokens are in at most as many slots of a device
    window = jnp.clip((start - device + stride - 1) // stride, 0, slots - count)
    # The first slot's token; the others' are `stride` apart. Slots without a token keep what they hold.
    first = window * stride + device - start
    tokens = first[:, None] + stride * jnp.arange(count)

    def take(array: jax.Array, at: jax.Array, size: int) -> jax.Array:
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size, axis=1))(array, at)

    if length > 1:
        pad = [(stride, count * stride) if axis == 2 else (0, 0) for axis in range(new.ndim)]
        new = take(jnp.pad(new, pad), first + stride, count * stride)
        new = new.reshape(*new.shape[:2], count, stride, *new.shape[3:])[:, :, :, 0]
    written = ((tokens >= 0) & (tokens < length)).reshape(len(array), 1, count, *(1,) * (array.ndim - 3))
    return write_slices(array, jnp.where(written, new, take(array, window, count)), window)


def in_order(array: jax.Array, length: int) -> jax.Array:
    """The first `length` slots of an array [B, K, S, ...] in order, whole on each device of `context`."""
    count = shards()
    if count == 1:
        return array[:, :, :length]
    array = sharding.constrain(array, P(*sharding.CACHE_BKSH[:3], *(None,) * (array.ndim - 3)))
    batch, heads, slots, *rest = array.shape
    striped = array.reshape(batch, heads, count, slots // count, *rest)
    return striped.swapaxes(2, 3).reshape(array.shape)[:, :, :length]


def grow(array: jax.Array, length: int) -> jax.Array:
    """An array [B, K, S, ...] with `length` slots, those after the first S empty.

    Args:
      array: striped where the mesh has an axis `context`.
      length: of the result; `context` divides it.
    """
    stride = shards()

    def pad(x: jax.Array) -> jax.Array:
        added = length // stride - x.shape[2]
        return jnp.pad(x, [(0, added if axis == 2 else 0) for axis in range(x.ndim)])

    if stride == 1:
        return pad(array)
    spec = _fit_slots(array)
    return spmd.shard_map_or_call(pad, (spec,), spec)(array)


def attend(
    start: Callable[[jax.Array, Any, Any], Partial],
    add_slots: Callable[..., Partial],
    q: jax.Array,
    k: Any,
    v: Any,
    mask: Any,
    prefix: Any,
    used: jax.Array | None,
) -> jax.Array:
    """Attention of all queries to a striped cache.

    Every device attends with all queries to its own slots; what is exchanged has the size of the queries. The
    maxima and sums are then merged: out = sum_d(exp(max_d - max) out_d) / sum_d(exp(max_d - max) total_d).

    Args:
      start: (q, prefix, mask) -> the partial result for the keys and values outside the cache, if any.
      add_slots: (partial result, q, k, v, mask, used) -> the partial result with the slots of k and v, of
        which the first `used` [] count, or all if it is None.
      q: [B, K, G, T, H].
      k: arrays [B, K, S, ...], striped.
      v: likewise.
      mask: an `attention.AttentionMask` of all slots.
      prefix: for `start`; heads lead its leaves.
      used: int [], the number of slots that are written, or None.

    Returns:
      [B, K, G, T, H] in q's dtype, sharded over `context` where it divides T.
    """
    stride = shards()

    def own(x: jax.Array | None, axis: int) -> jax.Array | None:
        """This device's slots of an array in the order of all slots."""
        if x is None:
            return None
        shape = *x.shape[:axis], x.shape[axis] // stride, stride, *x.shape[axis + 1 :]
        device = jax.lax.axis_index("context")
        return jax.lax.dynamic_index_in_dim(x.reshape(shape), device, axis + 1, keepdims=False)

    def local(q: jax.Array, k: Any, v: Any, mask: Any, prefix: Any, used: jax.Array | None) -> jax.Array:
        mask = mask._replace(k_positions=own(mask.k_positions, 1), allowed=own(mask.allowed, 2))
        if used is not None:
            used = (used - jax.lax.axis_index("context") + stride - 1) // stride
        row_max, total, out = start(q, prefix, mask)
        if prefix is not None:  # which every device adds, and the sum over them counts once
            total, out = total / stride, out / stride
        row_max, total, out = add_slots((row_max, total, out), q, k, v, mask, used)
        weight = jnp.exp(row_max - jax.lax.pmax(row_max, "context"))
        sums = jnp.concatenate([out, total[..., None]], axis=-1) * weight[..., None]
        if q.shape[3] % stride == 0:
            sums = jax.lax.psum_scatter(sums, "context", scatter_dimension=3, tiled=True)
        else:
            sums = jax.lax.psum(sums, "context")
        # A query without a key (in a row of length 0) has a total of 0.
        out, total = sums[..., :-1], sums[..., -1:]
        return (out / jnp.where(total > 0, total, 1.0)).astype(q.dtype)

    specs = (
        _fit(P(*sharding.QUERIES_BKGTH[:3], None, None), q),
        *(jax.tree.map(_fit_slots, x) for x in (k, v)),
        jax.tree.map(_fit_rows, mask),
        jax.tree.map(lambda x: _fit(sharding.PREFIX_KPH, x), prefix),
        None if used is None else P(),
    )
    out_spec = _fit(sharding.QUERIES_BKGTH, q)
    return spmd.shard_map_or_call(local, specs, out_spec)(q, k, v, mask, prefix, used)


def _fit(spec: P, x: jax.Array) -> P:
    """The first entries of `spec` for an array of the current mesh."""
    fitted = sharding.out_sharding(P(*spec[: x.ndim]), x.shape)
    assert fitted is not None
    return fitted


def _fit_slots(x: jax.Array) -> P:
    return _fit(sharding.STRIPED_BKSH, x)


def _fit_new(x: jax.Array) -> P:
    return _fit(sharding.CACHE_BKSH, x)


def _fit_rows(x: jax.Array) -> P:
    return _fit(P(sharding.BATCH, None, None), x)
