"""A mixture of experts (Mixtral, arXiv 2401.04088): a router chooses some of E feed-forward layers per token.

Routing is dropless: every token goes through all of its experts, whatever the load. Rows are sorted by expert
and multiplied group by group (`ops.grouped`). A form with a capacity per expert, above which tokens are
dropped (Switch Transformer, arXiv 2101.03961), is there for comparison.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import ConfigError
from llama_jax.ops import spmd
from llama_jax.ops.adapted import Adapted, expert_adapter_specs
from llama_jax.ops.grouped import Gathers, Groups, group_rows, grouped_dot
from llama_jax.ops.products import dot
from llama_jax.ops.quantization import Quantized
from llama_jax.ops.swiglu import swiglu

_SPECS = (sharding.EXPERTS_EDF, sharding.EXPERTS_EDF, sharding.EXPERTS_EFD)
_GATHERED = "gathered_experts"  # the checkpoint name of weights gathered over `fsdp` and `context`


def router_logits(x: jax.Array, router: jax.Array) -> jax.Array:
    """x [B, T, D] router [D, E] -> f32 [B, T, E], in f32 throughout: the choice of experts is a step."""
    spec = sharding.spec_of(x)
    router = sharding.gather(router.astype(jnp.float32), sharding.ROUTER_DE)
    out_spec = None if spec is None else P(*spec[:2], None)
    x = x.astype(jnp.float32)
    return jnp.einsum("btd,de->bte", x, router, precision="highest", out_sharding=out_spec)


def route(logits: jax.Array, num_experts_per_tok: int) -> tuple[jax.Array, jax.Array]:
    """The experts of each token and their weights: the softmax over the chosen logits.

    That is Mixtral's softmax over all experts, divided by the sum of the chosen.

    Args:
      logits: f32 [..., E].
      num_experts_per_tok: k.

    Returns:
      Weights f32 [..., k] and ids int32 [..., k], the largest first.
    """
    chosen, ids = jax.lax.top_k(logits, num_experts_per_tok)
    return jax.nn.softmax(chosen, axis=-1), ids


def experts(
    x: jax.Array,
    logits: jax.Array,
    w_gate: jax.Array | Quantized | Adapted,
    w_up: jax.Array | Quantized | Adapted,
    w_down: jax.Array | Quantized | Adapted,
    *,
    num_experts_per_tok: int,
    capacity_factor: float | None = None,
    custom_vjp: bool = False,
) -> jax.Array:
    """sum over the chosen experts e of weight_e w_down_e (silu(w_gate_e x) * w_up_e x).

    On a mesh each device computes the experts and the part of F that it has. With n tokens of D numbers on a
    device, k experts per token, and X devices along `expert`:

    - Dropless, the tokens are all-gathered over `expert`, and the outputs reduce-scattered: each moves
      (X - 1) n rows per device. A token goes to a device at most once, but all n may go to the same one, so
      an all-to-all that never drops needs static buffers of n rows for each device: (X - 1) n rows each way
      too. An all-to-all of ragged sizes would move about min(k, X) (X - 1) / X n; XLA:CPU has none.
    - With a capacity of capacity_factor n k / E rows per expert, an all-to-all moves capacity_factor k n
      (X - 1) / X rows each way, fewer where capacity_factor k < X.

    Weights are all-gathered over `fsdp` and `context`, with `custom_vjp` in the backward pass again, where
    their gradients are reduce-scattered in f32. Over
    `tensor` the outputs are summed, each device's part rounded to x's dtype, as in `ops.linear`.

    Args:
      x: [B, T, D].
      logits: f32 [B, T, E], of `router_logits`.
      w_gate: [E, D, F]; or quantized, with a leading dimension E in every leaf; either may have an adapter
        for each expert.
      w_up: likewise.
      w_down: [E, F, D], likewise.
      num_experts_per_tok: k.
      capacity_factor: None for dropless. Otherwise an expert takes at most capacity_factor n k / E of the n
        tokens of a device, first choices first, then in order; a token's weights are not changed by what is
        dropped. Which tokens are dropped depends on the mesh.
      custom_vjp: as for `grouped_dot`.

    Returns:
      [B, T, D] in x's dtype.

    Raises:
      ConfigError: for a capacity with quantized weights or adapters.
    """
    weights: tuple[Any, ...] = (w_gate, w_up, w_down)
    if capacity_factor is not None and not all(isinstance(weight, jax.Array) for weight in weights):
        found = "have LoRA adapters" if any(isinstance(w, Adapted) for w in weights) else "are quantized"
        raise ConfigError(f"expert_capacity needs plain weights, and these {found}; leave it out")
    local = functools.partial(_local, k=num_experts_per_tok, capacity=capacity_factor, custom_vjp=custom_vjp)
    axes, spec = sharding.explicit_axes(), sharding.spec_of(x)
    specs: tuple[Any, ...]
    gathers: tuple[P, ...]
    if spec is None:
        return local(x, logits, weights, (), P(None, None, None), (P(),) * 3)
    # A weight gathered inside varies over what it is gathered over: that must shard the tokens as well.
    used = {axis for entry in spec for axis in sharding.axes_of(entry)}
    inside = {*sharding.EXPERT_PARAMS} & {*axes} <= used
    bases = (weight.base if isinstance(weight, Adapted) else weight for weight in weights)
    if not inside or not all(isinstance(base, jax.Array) for base in bases):
        weights = tuple(_gather(w, s, x.dtype) for w, s in zip(weights, _SPECS, strict=True))
        gathers = (P(),) * 3
        specs = tuple(_specs(w, _without_params(s)) for w, s in zip(weights, _SPECS, strict=True))
    else:
        gathers = tuple(sharding.restrict(s, axes) for s in _SPECS)
        specs = tuple(_specs(w, s) for w, s in zip(weights, _SPECS, strict=True))
    function: Callable[..., jax.Array] = functools.partial(
        local, axes=tuple(axes), spec=spec, gathers=gathers
    )
    if custom_vjp:
        policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
        function = jax.checkpoint(function, policy=policy, prevent_cse=False)
    logits_spec = P(*spec[:2], None)
    return spmd.shard_map_or_call(function, (spec, logits_spec, specs), spec)(x, logits, weights)


def _local(
    x: jax.Array,
    logits: jax.Array,
    weights: tuple[Any, ...],
    axes: tuple[str, ...],
    spec: P,
    gathers: tuple[P, ...],
    *,
    k: int,
    capacity: float | None,
    custom_vjp: bool,
) -> jax.Array:
    """`experts` on one device's arrays: x is sharded by `spec` over the mesh axes `axes`."""
    batch_axes, length_axes = sharding.axes_of(spec[0]), sharding.axes_of(spec[1])
    gather = functools.partial(jax.lax.all_gather, tiled=True)
    if "tensor" in length_axes:
        x, logits = (gather(a, "tensor", axis=1) for a in (x, logits))
    dropless_axis = "expert" in axes and capacity is None
    if dropless_axis and "expert" in batch_axes:
        x, logits = (gather(a, "expert", axis=0) for a in (x, logits))
    within = [
        _gather_dimensions(s) if custom_vjp and capacity is None and isinstance(w, jax.Array) else ()
        for w, s in zip(weights, gathers, strict=True)
    ]
    weights = tuple(
        w if inside else _gather_local(w, s, x.dtype)
        for w, s, inside in zip(weights, gathers, within, strict=True)
    )
    rows, scores = x.reshape(-1, x.shape[-1]), logits.reshape(-1, logits.shape[-1])
    if capacity is None:
        y = _dropless(rows, scores, weights, within, k, "expert" in axes, custom_vjp)
    else:
        y = _with_capacity(rows, scores, weights, k, capacity, "expert" in axes)
    y = y.astype(x.dtype).reshape(x.shape)
    summed = []
    for axis, dimension, scattered in (
        ("tensor", 1, "tensor" in length_axes),
        ("expert", 0, "expert" in batch_axes),
    ):
        if axis not in axes or (axis == "expert" and not dropless_axis):
            continue
        if scattered:
            y = jax.lax.psum_scatter(y, axis, scatter_dimension=dimension, tiled=True)
        else:
            summed.append(axis)
    return jax.lax.psum(y, tuple(summed)) if summed else y


def _dropless(
    x: jax.Array,
    logits: jax.Array,
    weights: tuple[Any, ...],
    gathers: Sequence[Gathers],
    k: int,
    divided: bool,
    custom_vjp: bool,
) -> jax.Array:
    """f32 [n, D]: what the experts of this device add to the tokens x [n, D].

    Each weight is gathered in its product, where `gathers` says over what.
    """
    mixture, ids = route(logits, k)
    here = jax.tree.leaves(weights[0])[0].shape[0]
    if divided:
        ids = ids - jax.lax.axis_index("expert") * here
        ids = jnp.where((ids >= 0) & (ids < here), ids, here)
    max_rows = x.shape[0] * min(k, here)
    groups, source, place = group_rows(ids.reshape(-1), here, max_rows=max_rows)
    place = place.reshape(ids.shape)
    take, combine = (_take_rows, _combine) if custom_vjp else (_take_rows.fun, _combine.fun)
    x, mixture, source, place, groups = spmd.pvary_like((x, mixture, source, place, groups), weights)
    product = functools.partial(_product, groups=groups, custom_vjp=custom_vjp)
    rows = take(x, source, place)
    gate, up = (
        checkpoint_name(product(rows, weights[0], gathers[0]), "gate"),
        checkpoint_name(product(rows, weights[1], gathers[1]), "up"),
    )
    return combine(product(swiglu(gate, up), weights[2], gathers[2]), mixture, source, place)


def _product(x: jax.Array, weight: Any, gathers: Gathers, *, groups: Groups, custom_vjp: bool) -> jax.Array:
    """`grouped_dot`; with an adapter x W + scale (x a) b, in that order and rounded as in `ops.linear`.

    Where `tensor` shards F, the adapter of `w_down` adds its part to each device's part of the output.
    """
    grouped = functools.partial(grouped_dot, groups=groups, custom_vjp=custom_vjp)
    if not isinstance(weight, Adapted):
        return grouped(x, weight, gathers=gathers)
    y, update = grouped(x, weight.base), grouped(grouped(x, weight.a), weight.b)
    return (y.astype(jnp.float32) + weight.scale * update.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def _take_rows(x: jax.Array, source: jax.Array, place: jax.Array) -> jax.Array:
    """Rows of x [n, D] in the order of `group_rows`, [M, D], zero at padding.

    The custom backward pass gathers, where a transposed gather would scatter row by row.

    Args:
      x: [n, D].
      source: int [M], the choice at each place: token times k plus the number of the choice.
      place: int [n, k], the inverse; M where there is none.
    """
    return x.at[source // place.shape[1]].get(mode="fill", fill_value=0)


def _take_rows_forward(x: jax.Array, source: jax.Array, place: jax.Array) -> Any:
    return _take_rows(x, source, place), place


def _take_rows_backward(place: jax.Array, d_rows: jax.Array) -> Any:
    ones = jnp.ones(place.shape, jnp.float32)
    return _combine.fun(d_rows, ones, None, place).astype(d_rows.dtype), None, None


_take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def _combine(rows: jax.Array, mixture: jax.Array, source: Any, place: jax.Array) -> jax.Array:
    """f32 [n, D]: the sum over a token's choices of mixture [n, k] times the row of [M, D] at `place`."""
    return sum(  # type: ignore[return-value]
        mixture[:, j, None] * rows.at[place[:, j]].get(mode="fill", fill_value=0).astype(jnp.float32)
        for j in range(place.shape[1])
    )


def _combine_forward(rows: jax.Array, mixture: jax.Array, source: jax.Array, place: jax.Array) -> Any:
    return _combine(rows, mixture, source, place), (rows, mixture, source, place)


def _combine_backward(residuals: Any, d_out: jax.Array) -> Any:
    rows, mixture, source, place = residuals
    k = place.shape[1]
    weight = mixture.reshape(-1).at[source].get(mode="fill", fill_value=0)[:, None]
    d_rows = weight * d_out.at[source // k].get(mode="fill", fill_value=0)
    chosen = (rows.at[place[:, j]].get(mode="fill", fill_value=0).astype(jnp.float32) for j in range(k))
    d_mixture = jnp.stack([(d_out * row).sum(-1) for row in chosen], axis=1)
    return d_rows.astype(rows.dtype), d_mixture, None, None


_combine.defvjp(_combine_forward, _combine_backward)


def _with_capacity(
    x: jax.Array, logits: jax.Array, weights: tuple[Any, ...], k: int, factor: float, divided: bool
) -> jax.Array:
    """f32 [n, D]: the experts' outputs for the tokens x [n, D], each expert with room for a fixed number."""
    mixture, ids = route(logits, k)
    (n, _), num_experts = x.shape, logits.shape[1]
    room = min(math.ceil(factor * n * k / num_experts), n)
    choices = ids.T.reshape(-1)  # first choices first
    is_chosen = choices[:, None] == jnp.arange(num_experts)
    rank = (jnp.cumsum(is_chosen, axis=0, dtype=jnp.int32) - 1)[jnp.arange(choices.size), choices]
    place = jnp.where(rank < room, choices * room + rank, num_experts * room)
    tokens = jnp.tile(jnp.arange(n, dtype=jnp.int32), k)
    source = jnp.full(num_experts * room, n, jnp.int32)
    source, tokens, place = spmd.pvary_like((source, tokens, place))
    source = source.at[place].set(tokens, mode="drop", unique_indices=True)
    rows = x.at[source].get(mode="fill", fill_value=0).reshape(num_experts, room, -1)
    exchange = functools.partial(jax.lax.all_to_all, axis_name="expert", tiled=True)
    if divided:
        rows = exchange(rows, split_axis=0, concat_axis=1)
    w_gate, w_up, w_down = (weight.astype(x.dtype) for weight in weights)
    gate, up = (dot("ecd,edf->ecf", rows, weight).astype(x.dtype) for weight in (w_gate, w_up))
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    out = dot("ecf,efd->ecd", swiglu(gate, up), w_down).astype(x.dtype)
    if divided:
        out = exchange(out, split_axis=1, concat_axis=0)
    return _combine.fun(out.reshape(-1, x.shape[1]), mixture, None, place.reshape(k, n).T)


def _gather_local(weight: Any, spec: P, dtype: jnp.dtype) -> Any:
    """Inside `shard_map`, a plain weight in the compute dtype, gathered over `fsdp` and `context`.

    Of one with adapters these are gathered likewise. An empty spec leaves any weight as it is.
    """
    if spec and isinstance(weight, Adapted):
        parts, specs = (weight.base, weight.a, weight.b), (spec, *expert_adapter_specs(spec))
        base, a, b = (_gather_local(part, s, dtype) for part, s in zip(parts, specs, strict=True))
        return dataclasses.replace(weight, base=base, a=a, b=b)
    for dimension, axes in _gather_dimensions(spec):
        weight = jax.lax.all_gather(weight.astype(dtype), axes, axis=dimension, tiled=True)
        weight = checkpoint_name(weight, _GATHERED)
    return weight


def _gather_dimensions(spec: P) -> Gathers:
    """The dimensions of a weight with this spec that `fsdp` and `context` shard, and by which of them."""
    gathers = (
        (dimension, tuple(axis for axis in sharding.axes_of(entry) if axis in sharding.EXPERT_PARAMS))
        for dimension, entry in enumerate(spec)
    )
    return tuple((dimension, axes) for dimension, axes in gathers if axes)


def _without_params(spec: P) -> P:
    return P(*(None if entry == sharding.EXPERT_PARAMS else entry for entry in spec))


def _gather(weight: Any, spec: P, dtype: jnp.dtype) -> Any:
    """A weight, quantized or with adapters too, gathered over `fsdp` and `context`; plain in this dtype."""
    if isinstance(weight, Adapted):
        a_spec, b_spec = expert_adapter_specs(spec)
        base, a = _gather(weight.base, spec, dtype), _gather(weight.a, a_spec, dtype)
        return dataclasses.replace(weight, base=base, a=a, b=_gather(weight.b, b_spec, dtype))
    weight = weight.astype(dtype) if isinstance(weight, jax.Array) else weight
    return jax.tree.map(sharding.constrain, weight, _specs(weight, _without_params(spec)))


def _specs(weight: Any, spec: P) -> Any:
    """The partition specs of the leaves of a weight [E, I, O] that has this one."""
    replace: Any = dataclasses.replace
    if isinstance(weight, Adapted):
        a, b = expert_adapter_specs(spec)
        return replace(weight, base=_specs(weight.base, spec), a=a, b=b, scale=P())
    if isinstance(weight, Quantized):
        expert, inputs, outputs = spec
        scale = P(expert, outputs, inputs if weight.bits != 8 else None)
        values = P(expert, outputs, inputs, *(None,) * (weight.values.ndim - 3))
        minimum = None if weight.minimum is None else scale
        return replace(weight, values=values, scale=scale, minimum=minimum)
    return spec
