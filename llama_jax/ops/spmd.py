"""Helpers for code that runs on each device's own shard (`jax.shard_map`), and unchanged without a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from llama_jax.sharding import explicit_axes, is_spec, restrict


def pvary_like(tree: Any, *others: Any) -> Any:
    """Inside `shard_map`, marks every leaf of `tree` as varying over what any leaf here varies over.

    A loop's state must keep its type, and `shard_map` makes part of the type which mesh axes a value may
    differ along: a state that starts as zeros does not yet differ along any. Elsewhere this does nothing.
    """

    def varying(leaf: Any) -> frozenset[str]:
        manual = getattr(jax.typeof(leaf), "manual_axis_type", None)  # private: tests/test_private_seams.py
        return frozenset() if manual is None else manual.varying

    union = frozenset().union(*map(varying, jax.tree.leaves((tree, others))))

    def mark(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(union - varying(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree) if union else tree


def shard_map_or_call(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` over each device's own part of its arguments (`shard_map`); itself where there is no mesh.

    Inputs are laid out by `in_specs` first. An axis that the mesh leaves out is dropped from the specs.
    """
    axes = explicit_axes()
    if not axes:
        return function
    into, out = jax.tree.map(lambda spec: restrict(spec, axes), (in_specs, out_specs), is_leaf=is_spec)
    mapped = jax.shard_map(function, in_specs=into, out_specs=out)
    return lambda *args: mapped(*jax.tree.map(jax.sharding.reshard, args, into))


def reduce_scatter_grad(x: jax.Array, dimension: int | None, axes: Iterable[str]) -> jax.Array:
    """Inside `shard_map_or_call`: sums `x` over `data`, `context` and `fsdp`; returns this device's shard.

    Work-around for XLA:TPU (JAX 0.12.0.1): over all three dimensions of a TPU torus, from 64 devices on, it
    compiles a reduce-scatter to an all-reduce, which moves twice the bytes. Over one dimension of four
    devices and then over the other two it does not.

    Args:
      x: a device's share of a weight's gradient.
      dimension: the one that `fsdp` splits; None where it splits none, and each device gets the whole sum.
      axes: the mesh's.
    """
    axes = set(axes)
    whole = ("data", "context") if dimension is not None else ("data", "context", "fsdp")
    if over := tuple(name for name in whole if name in axes):
        x = jax.lax.psum(x, over)
    if dimension is None or "fsdp" not in axes:
        return x
    scatter = functools.partial(
        jax.lax.psum_scatter, axis_name="fsdp", scatter_dimension=dimension, tiled=True
    )
    size = jax.lax.axis_size("fsdp")
    if size < 64 or size % 4:
        return scatter(x)
    rest = size // 4

    def in_two_stages(x: jax.Array) -> jax.Array:
        x = scatter(x, axis_index_groups=[[a * rest + b for a in range(4)] for b in range(rest)])
        return scatter(x, axis_index_groups=[[a * rest + b for b in range(rest)] for a in range(4)])

    return jax.lax.platform_dependent(x, tpu=in_two_stages, default=scatter)


def pvary_all(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`pvary_like` of arrays among themselves: what a `custom_vjp` inside `shard_map` needs of its inputs."""
    return pvary_like(arrays)
