"""Helpers for code that runs on each device's own shard (`jax.shard_map`), and unchanged without a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from llama_jax.sharding import BATCH, PARAMS, explicit_axes, is_spec, restrict


def pvary_like(tree: Any, *others: Any) -> Any:
    """Inside `shard_map`, makes every leaf of `tree` device-varying over the union of all manual mesh axes.

    The mesh axes that a value varies over are a part of its type in `shard_map`, and a loop carry must keep
    its type: a carry that is initialized to zeros varies over none yet. Outside `shard_map` this returns
    `tree`.
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
    """`shard_map` of `function` over the current mesh; `function` itself where there is none.

    The arguments are resharded to `in_specs` first. Axes that the mesh does not have are dropped from the
    specs.
    """
    axes = explicit_axes()
    if not axes:
        return function
    in_specs, out_specs = jax.tree.map(
        lambda spec: restrict(spec, axes), (in_specs, out_specs), is_leaf=is_spec
    )
    mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs)
    return lambda *args: mapped(*jax.tree.map(jax.sharding.reshard, args, in_specs))


def reduce_scatter_grad(
    x: jax.Array, dimension: int | None, axes: Iterable[str], *, over_tensor: bool = False
) -> jax.Array:
    """Inside `shard_map_or_call`: sums `x` over `data`, `context` and `fsdp`; returns this device's shard.

    It is scattered over `fsdp` and `context` first: only shards are summed over the other axes.

    Args:
      x: this device's contribution to the gradient of a weight.
      dimension: the one that `fsdp` and `context` shard; None where they shard none, and each device gets the
        whole sum.
      axes: the names of the mesh axes.
      over_tensor: sum over `tensor` too, which shards the rows that `x` is a sum of.
    """
    names = set(axes)
    scattered = tuple(axis for axis in PARAMS if axis in names) if dimension is not None else ()
    summed = {*BATCH, *PARAMS, *(("tensor",) if over_tensor else ())} & names - {*scattered}
    if scattered:
        x = jax.lax.psum_scatter(x, scattered, scatter_dimension=dimension, tiled=True)
    return jax.lax.psum(x, tuple(sorted(summed))) if summed else x


def pvary_all(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`pvary_like` over the arrays themselves: a `custom_vjp` in `shard_map` needs inputs that vary alike."""
    return pvary_like(arrays)
