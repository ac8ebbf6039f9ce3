"""Sums over the segments of packed rows, where they are needed: at each segment's or pair's last token."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def running_sums(values: jax.Array, ids: jax.Array) -> jax.Array:
    """Sums of values so far in each run of equal ids: the whole run's at its last entry.

    Args:
      values: f32 [B, T].
      ids: int [B, T].

    Returns:
      f32 [B, T].
    """

    def join(
        left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        began, total = left
        begins, value = right
        return began | begins, jnp.where(begins, value, total + value)

    return jax.lax.associative_scan(join, (_first(ids), values), axis=1)[1]


def last(ids: jax.Array) -> jax.Array:
    """bool [B, T]: where a segment ends; padding, id 0, has none."""
    following = jnp.concatenate([ids[:, 1:], jnp.full_like(ids[:, :1], -1)], axis=1)
    return (ids != following) & (ids > 0)


def _first(ids: jax.Array) -> jax.Array:
    before = jnp.concatenate([jnp.full_like(ids[:, :1], -1), ids[:, :-1]], axis=1)
    return ids != before
