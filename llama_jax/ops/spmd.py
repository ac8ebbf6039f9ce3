"""Helpers for code that runs on each device's own shard (`jax.shard_map`), and unchanged without a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax._src import shard_map as shard_map_lib
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

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


def sum_over_data(
    function: Callable[..., Any], dtype: jax.typing.DTypeLike, batch_argument: int = 1
) -> Callable[..., Any]:
    """Runs `function` on the rows of each index of the mesh axis `data` apart, and sums the results once.

    However many gradients `function` adds up, one sum of the shards of the total crosses `data`, the axis
    between slices. Without that axis, or where it has size 1, `function` is returned.

    Args:
      function: (params, batch, ...) -> (loss, gradients), sums over the rows of the batch. Inside, `data` is
        not an axis of the mesh.
      dtype: in which the gradients are summed over `data`; the loss is summed in its own.
      batch_argument: the position of the batch, arrays [B, ...]; other arguments are the same for all rows.
    """
    if explicit_axes().get("data", 1) == 1:
        return function
    _keep_explicit_shardings()

    def apart(*args: Any) -> Any:
        return jax.tree.map(lambda x: x[None], function(*args))

    def summed(loss: Any, grads: Any) -> Any:
        grads = jax.tree.map(lambda g: jax.lax.psum(g[0].astype(dtype), "data").astype(g.dtype), grads)
        return jax.tree.map(lambda x: jax.lax.psum(x[0], "data"), loss), grads

    def mapped(*args: Any) -> Any:
        in_specs = tuple(P("data") if place == batch_argument else P() for place in range(len(args)))
        # With `check_vma`, JAX (0.10.2, 0.12.0.1) cannot lower a `shard_map` inside of this one that is
        # differentiated: it gives its residuals the outer axes too.
        over_data = functools.partial(jax.shard_map, axis_names={"data"}, check_vma=False)
        parts = over_data(apart, in_specs=in_specs, out_specs=P("data"))(*args)
        # Summed in a `shard_map` over all axes: on a sum of bf16 inside of one over `data` alone XLA:CPU (JAX
        # 0.10.2, 0.12.0.1) ends the process.
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, parts)
        out_specs = jax.tree.map(lambda spec: P(*spec[1:]), specs, is_leaf=is_spec)
        return jax.shard_map(summed, in_specs=specs, out_specs=out_specs)(*parts)

    return mapped


def _keep_explicit_shardings() -> None:
    """Makes a `shard_map` over some axes keep the shardings of its arguments and results over the others.

    Work-around for JAX 0.10.2, which gathers them over all other axes, explicit ones too. JAX 0.12 lowers the
    sharding of the type, as this does.
    """
    original = shard_map_lib._shardy_shard_map_sharding  # private: tests/test_private_seams.py
    if jax.__version_info__ >= (0, 11) or original.__module__ == __name__:
        return

    @functools.wraps(original)
    def from_type(context: Any, mesh: Any, manual_axes: Any, spec: P, aval: Any) -> Any:
        kinds = {AxisType.Explicit, AxisType.Manual}
        if aval.sharding.mesh.axis_types and kinds.issuperset(aval.sharding.mesh.axis_types):
            spec = aval.sharding.spec
        return original(context, mesh, manual_axes, spec, aval)

    from_type.__module__ = __name__
    shard_map_lib._shardy_shard_map_sharding = from_type  # type: ignore[assignment]


def pvary_all(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`pvary_like` over the arrays themselves: a `custom_vjp` in `shard_map` needs inputs that vary alike."""
    return pvary_like(arrays)
