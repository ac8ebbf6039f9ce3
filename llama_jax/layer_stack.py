"""Applies a model's layers: a scan where they are stacked, one compiled body whatever L is; else unrolled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from llama_jax import rope, sharding
from llama_jax.config import LlamaConfig
from llama_jax.forward_options import ForwardOptions
from llama_jax.layers import Attend, Block
from llama_jax.ops.remat import rematerialize
from llama_jax.taps import Taps

Found = dict[str, jax.Array]  # captured values by site, [layers, ...]


def run_layers(
    config: LlamaConfig,
    params: Any,
    x: jax.Array,
    table: rope.Rotary,
    attend_in_layer: Callable[[int], Attend],
    *,
    options: ForwardOptions = ForwardOptions(),
    taps: Taps | None = None,
) -> tuple[jax.Array, Any, Found]:
    """Applies all layers to x.

    Where layers differ (`LlamaConfig.layer_kinds`), the scan's body is one period of them.

    Args:
      config: the model.
      params: its parameters.
      x: [B, T, D].
      table: rotary angles.
      attend_in_layer: the `attend` of a layer, by its index; where layers are stacked, by that in the period.
      options: of the forward pass.
      taps: an edit and captures; None for neither.

    Returns:
      x after all layers; what `Block` returned beside it, of each layer where they are not stacked; and what
      was captured.
    """
    block, kinds = Block(config, options.custom_vjp, options.expert_capacity), config.layer_kinds

    def layer(index: int) -> Callable[..., tuple[jax.Array, Any]]:
        angles, attend = table if kinds[index].rope else None, attend_in_layer(index)
        apply: Callable[..., tuple[jax.Array, Any]]
        if taps is None:
            apply = lambda x, weights: block.apply({"params": weights}, x, angles, attend)  # noqa: E731
        else:

            def apply(x: jax.Array, weights: Any, number: Any) -> tuple[jax.Array, Any]:
                tap = taps.at(number)
                x, output = block.apply({"params": weights}, x, angles, attend, tap)
                return x, (output, tap.found)

        return rematerialize(apply, options.remat)

    layers = params["layers"]
    if not isinstance(layers, Mapping):
        return _unrolled(layers, x, layer, taps)
    period = config.layer_period
    if taps is not None:
        return _tapped_scan(layers, x, [layer(index) for index in range(period)], taps)
    if period == 1:
        return *jax.lax.scan(layer(0), x, layers), {}

    def run_period(x: jax.Array, weights: Any) -> tuple[jax.Array, Any]:
        outputs = []
        for index in range(period):
            x, output = layer(index)(x, jax.tree.map(lambda leaf: leaf[index], weights))  # noqa: B023
            outputs.append(output)
        return x, outputs

    return *jax.lax.scan(run_period, x, _grouped(layers, period)), {}


def _grouped(layers: Any, period: int) -> Any:
    """[L, ...] -> [L / period, period, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:]), layers)


def _unrolled(
    layers: Any, x: jax.Array, layer: Callable[[int], Callable[..., Any]], taps: Taps | None
) -> tuple[jax.Array, Any, Found]:
    outputs, captured = [], []
    for index, weights in enumerate(layers):
        if taps is None:
            x, output = layer(index)(x, weights)
        else:
            x, (output, found) = layer(index)(x, weights, index)
            if taps.layers is None or index in taps.layers:
                captured.append(found)
        outputs.append(output)
    return x, outputs, jax.tree.map(lambda *leaves: jnp.stack(leaves), *captured) if captured else {}


def _tapped_scan(
    layers: Any, x: jax.Array, period: list[Callable[..., Any]], taps: Taps
) -> tuple[jax.Array, Any, Found]:
    """The scan with an edit and captures, which are rows of arrays that it carries."""
    count, length = jax.tree.leaves(layers)[0].shape[0], len(period)
    chosen = range(count) if taps.layers is None else taps.layers
    slots = np.full(count, len(chosen))  # where layers that are not captured go
    slots[list(chosen)] = np.arange(len(chosen))

    def run(x: jax.Array, weights: Any, numbers: Any) -> tuple[jax.Array, list[Any], list[Found]]:
        outputs, captured = [], []
        for index, apply in enumerate(period):
            here = weights if length == 1 else jax.tree.map(lambda leaf: leaf[index], weights)  # noqa: B023
            x, (output, found) = apply(x, here, numbers if length == 1 else numbers[index])
            outputs.append(output)
            captured.append(found)
        return x, outputs, captured

    def body(carry: Any, inputs: Any) -> tuple[Any, Any]:
        x, kept = carry
        weights, numbers, places = inputs
        x, outputs, captured = run(x, weights, numbers)
        for index, found in enumerate(captured):
            place = places if length == 1 else places[index]
            write = lambda rows, value: jax.lax.dynamic_update_index_in_dim(rows, value, place, 0)  # noqa: B023, E731
            kept = jax.tree.map(write, kept, found)
        return (x, kept), outputs[0] if length == 1 else outputs

    group = (lambda a: a) if length == 1 else (lambda a: a.reshape(-1, length))
    stack = layers if length == 1 else _grouped(layers, length)
    inputs = (stack, group(jnp.arange(count)), group(jnp.asarray(slots)))
    shapes = jax.eval_shape(lambda: run(x, *jax.tree.map(lambda leaf: leaf[0], inputs[:2])))[2][0]
    kept = {name: _rows(shape, len(chosen) + 1) for name, shape in shapes.items()}
    (x, kept), outputs = jax.lax.scan(body, (x, kept), inputs)
    return x, outputs, {name: rows[:-1] for name, rows in kept.items()}


def _rows(shape: Any, count: int) -> jax.Array:
    """Zeros [count, ...], sharded like one of the rows."""
    spec = getattr(getattr(shape, "sharding", None), "spec", None)
    layout = None if spec is None else sharding.out_sharding(P(None, *spec))
    return jnp.zeros((count, *shape.shape), shape.dtype, out_sharding=layout)
