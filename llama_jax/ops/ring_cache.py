"""One layer's key/value cache as a ring of slots: for a sliding window, whatever the length of the text.

Position p of a row is in slot p mod R. A query with a window of w reads the w positions up to its own; T
tokens are written before they attend, so R is at least w + T - 1. Tokens that are taken back, such as
rejected drafts, need no clean-up: what they overwrote is R positions back, before the windows of all later
queries, if at most R - w of them are taken back. A ring that is longer than its text is a plain cache.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops import spmd
from llama_jax.ops.layouts import write_slices

EMPTY = 2**31 - 1
"""The position of an empty slot: after every query."""


def positions(end: jax.Array, slots: jax.Array) -> jax.Array:
    """The position that each slot holds, int [B, R].

    Args:
      end: int [B], the number of tokens in each row: the last written position is end - 1.
      slots: int [R], 0..R-1.
    """
    last = end[:, None] - 1
    held = last - (last - slots) % slots.shape[0]
    return jnp.where(held >= 0, held, EMPTY)


def write(tree: Any, new: Any, start: jax.Array, end: jax.Array | None = None) -> Any:
    """Writes the tokens of positions start..start+T-1 of each row, in place where XLA can reuse the buffers.

    Args:
      tree: arrays [B, K, R, ...].
      new: as many arrays [B, K, T, ...]; T is at most R.
      start: int [B].
      end: int [B], the number of tokens in each row: those of positions from `end` on are padding, and are
        not written; or None.
    """
    length, slots = (jax.tree.leaves(x)[0].shape[2] for x in (new, tree))
    if length == 1 and end is None:
        return jax.tree.map(lambda x, new: write_slices(x, new, start % slots), tree, new)
    count = jnp.full_like(start, length) if end is None else jnp.clip(end - start, 0, length)

    def local(tree: Any, new: Any, start: jax.Array, count: jax.Array) -> Any:
        return jax.tree.map(lambda x, new: _write(x, new, start, count), tree, new)

    if not sharding.explicit_axes():
        return local(tree, new, start, count)
    slot_specs, new_specs, row_spec = (
        jax.tree.map(lambda x: sharding.out_sharding(P(*spec[: x.ndim]), x.shape), x)  # noqa: B023
        for x, spec in ((tree, sharding.CACHE_BKSH), (new, sharding.CACHE_BKSH), (start, sharding.ROWS_B))
    )
    specs = slot_specs, new_specs, row_spec, row_spec
    return spmd.shard_map_or_call(local, specs, slot_specs)(tree, new, start, count)


def _write(array: jax.Array, new: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
    """Writes the first `count` [B] tokens: those up to the last slot, and those that go on from slot 0."""
    slots, length = array.shape[2], new.shape[2]
    for first in (jnp.minimum(start % slots, slots - length), jnp.zeros_like(start)):
        token = (first[:, None] + jnp.arange(length) - start[:, None]) % slots
        values = jax.vmap(lambda row, at: jnp.take(row, at, axis=1))(new, jnp.minimum(token, length - 1))
        old = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, length, axis=1))(array, first)
        is_new = (token < count[:, None]).reshape(len(array), 1, length, *(1,) * (array.ndim - 3))
        array = write_slices(array, jnp.where(is_new, values, old), first)
    return array
