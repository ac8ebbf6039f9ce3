"""The zig-zag order of a sequence over the mesh axis `context`, which balances causal attention.

The sequence is divided into 2C chunks for C devices, and device i has chunks i and 2C - 1 - i, in this order.
A query reads the keys before it: in this order all devices have as many of them (the load balancing of
Llama 3's context parallelism, arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import ConfigError
from llama_jax.ops import spmd

AXIS = "context"


def shards() -> int:
    """The size of `context` in the current mesh; 1 without one."""
    return sharding.explicit_axes().get(AXIS, 1)


def check_length(length: int, multiple: int = 1) -> None:
    """Checks that the mesh divides a row of `length` tokens into chunks of a multiple of `multiple` tokens.

    Raises:
      ConfigError: with the nearest lengths that it divides.
    """
    unit = 2 * shards() * multiple
    if length % unit:
        below = f"{length // unit * unit} or " if length > unit else ""
        raise ConfigError(
            f"sequences of {length} tokens do not divide over mesh axis context of size {shards()}, which "
            f"needs a multiple of {unit}: {below}{-(-length // unit) * unit}"
        )


def enter(tree: Any) -> Any:
    """Puts arrays [B, T, ...], sharded over `context`, into zig-zag order; leaves of None stay.

    Each device sends both of its chunks, once. `leave` is the inverse, and the gradient.
    """
    return jax.tree.map(lambda x: _enter(_over_context(x)), tree)


def leave(tree: Any) -> Any:
    """Puts arrays [B, T, ...] in zig-zag order back into the order of the row."""
    return jax.tree.map(lambda x: _leave(_over_context(x)), tree)


@jax.custom_vjp
def _enter(x: jax.Array) -> jax.Array:
    return _on_each_device(_enter_locally, x)


@jax.custom_vjp
def _leave(x: jax.Array) -> jax.Array:
    return _on_each_device(_leave_locally, x)


_enter.defvjp(lambda x: (_enter(x), None), lambda _, d: (_leave(d),))
_leave.defvjp(lambda x: (_leave(x), None), lambda _, d: (_enter(d),))


def _over_context(x: jax.Array) -> jax.Array:
    """Gathers x over `tensor`, which divides the positions of the residual stream too."""
    return sharding.constrain(x, _spec(x))


def _spec(x: jax.Array) -> P:
    return P(sharding.BATCH, AXIS, *(sharding.spec_of(x) or P(*(None,) * x.ndim))[2:])


def _on_each_device(function: Any, x: jax.Array) -> jax.Array:
    spec = _spec(x)
    return spmd.shard_map_or_call(functools.partial(function, count=shards()), (spec,), spec)(x)


def _enter_locally(x: jax.Array, *, count: int) -> jax.Array:
    """Chunks 2i and 2i + 1 -> chunks i and 2 count - 1 - i of device i."""
    even, odd = jnp.split(x, 2, axis=1)
    even = jax.lax.ppermute(even, AXIS, _to_zigzag(count, 0))
    odd = jax.lax.ppermute(odd, AXIS, _to_zigzag(count, 1))
    return jnp.concatenate(_in_turn(even, odd), axis=1)


def _leave_locally(x: jax.Array, *, count: int) -> jax.Array:
    even, odd = _in_turn(*jnp.split(x, 2, axis=1))
    even = jax.lax.ppermute(even, AXIS, [(b, a) for a, b in _to_zigzag(count, 0)])
    odd = jax.lax.ppermute(odd, AXIS, [(b, a) for a, b in _to_zigzag(count, 1)])
    return jnp.concatenate([even, odd], axis=1)


def _to_zigzag(count: int, parity: int) -> list[tuple[int, int]]:
    """(device that has chunk 2i + parity, device that needs it) for all i."""
    return [(i, min(2 * i + parity, 2 * count - 1 - 2 * i - parity)) for i in range(count)]


def _in_turn(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two, exchanged on devices of odd index: of chunks i and 2C - 1 - i, one is even and one odd."""
    is_odd = jax.lax.axis_index(AXIS) % 2 == 1
    return jnp.where(is_odd, second, first), jnp.where(is_odd, first, second)
