"""The sum of gradients over the mesh axis `data`, between slices, once a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax._src import shard_map as shard_map_lib
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from llama_jax.ops.int8_sum import sum_in_int8
from llama_jax.sharding import explicit_axes, is_spec


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Maximum:
    """A part of a loss that is not summed over parts of a batch: the larger value stands.

    Attributes:
      value: an array.
    """

    value: jax.Array


def added(a: Any, b: Any) -> Any:
    """The sum of two trees of one structure, and the maximum where they have a `Maximum`."""

    def combine(a: Any, b: Any) -> Any:
        return Maximum(value=jnp.maximum(a.value, b.value)) if isinstance(a, Maximum) else a + b

    return jax.tree.map(combine, a, b, is_leaf=_is_maximum)


def _is_maximum(x: Any) -> bool:
    return isinstance(x, Maximum)


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

    def summed(loss: Any, grads: Any) -> Any:
        grads = jax.tree.map(lambda g: jax.lax.psum(g[0].astype(dtype), "data").astype(g.dtype), grads)
        return _sum_parts(loss), grads

    def mapped(*args: Any) -> Any:
        parts = _apart(function, args, batch_argument)
        # Summed in a `shard_map` over all axes: on a sum of bf16 inside of one over `data` alone XLA:CPU (JAX
        # 0.10.2, 0.12.0.1) ends the process.
        specs = _specs(parts)
        return jax.shard_map(summed, in_specs=specs, out_specs=_whole(specs))(*parts)

    return mapped


def sum_over_data_in_int8(
    function: Callable[..., Any], unit: Callable[[Any], jax.Array], batch_argument: int = 1
) -> Callable[..., Any]:
    """`sum_over_data` in int8 with error feedback, where the mesh axis `data` is above 1.

    Args:
      function, batch_argument: as there; gradients are f32.
      unit: maps the summed loss to what gradients are divided by before they are quantized, so that what one
        sum leaves out has the same weight in the next.

    Returns:
      (residual, *arguments) -> (loss, gradients, residual). The residual is a tree like the gradients, with a
      leading dimension that `data` shards.
    """

    def summed(loss: Any, grads: Any, residual: Any) -> Any:
        loss = _sum_parts(loss)
        count = unit(loss)
        leaves, structure = jax.tree.flatten(grads)
        pairs = zip(leaves, jax.tree.leaves(residual), strict=True)
        sums = [sum_in_int8(g[0] / count, e[0], "data") for g, e in pairs]
        totals, errors = zip(*sums, strict=True)
        rebuild = functools.partial(jax.tree.unflatten, structure)
        return loss, rebuild([total * count for total in totals]), rebuild([error[None] for error in errors])

    def mapped(residual: Any, *args: Any) -> Any:
        parts = (*_apart(function, args, batch_argument), residual)
        specs = _specs(parts)
        out_specs = (*_whole(specs[:2]), specs[2])
        # Without `check_vma`: to JAX what is all-gathered over an axis varies over it.
        return jax.shard_map(summed, in_specs=specs, out_specs=out_specs, check_vma=False)(*parts)

    return mapped


def _apart(function: Callable[..., Any], args: Sequence[Any], batch_argument: int) -> Any:
    """The results of `function` for the rows of each index of `data`, along a new first dimension."""
    _keep_explicit_shardings()

    def apart(*args: Any) -> Any:
        return jax.tree.map(lambda x: x[None], function(*args))

    in_specs = tuple(P("data") if place == batch_argument else P() for place in range(len(args)))
    # With `check_vma`, JAX (0.10.2, 0.12.0.1) cannot lower a `shard_map` inside of this one that is
    # differentiated: it gives its residuals the outer axes too.
    over_data = functools.partial(jax.shard_map, axis_names={"data"}, check_vma=False)
    return over_data(apart, in_specs=in_specs, out_specs=P("data"))(*args)


def _sum_parts(parts: Any) -> Any:
    def over_data(x: Any) -> Any:
        return (
            Maximum(value=jax.lax.pmax(x.value[0], "data"))
            if isinstance(x, Maximum)
            else jax.lax.psum(x[0], "data")
        )

    return jax.tree.map(over_data, parts, is_leaf=_is_maximum)


def _specs(parts: Any) -> Any:
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, parts)


def _whole(specs: Any) -> Any:
    """The specs of sums over the first dimension."""
    return jax.tree.map(lambda spec: P(*spec[1:]), specs, is_leaf=is_spec)


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
