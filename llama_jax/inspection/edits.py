"""Ready-made edits: steering, ablation, activation patching, attention knock-out, head pruning.

Each is a pytree (site, layer, value) -> value. Its arrays are arguments of a compiled program: another
vector, strength or choice of as many layers does not compile again. `together` applies several in turn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.errors import InputError
from llama_jax.taps import ATTENTION_WEIGHTS, SITES, Edit, check_name

Layers = int | Sequence[int] | jax.Array | None  # indices from 0, which may be traced; None: all layers


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["layers", "vector", "scale"], meta_fields=["site"]
)
@dataclasses.dataclass(frozen=True)
class _Steer:
    site: str
    layers: jax.Array | None
    vector: jax.Array
    scale: jax.Array

    def __call__(self, site: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        if site != self.site:
            return value
        return _where(self.layers, layer, value + (self.scale * self.vector).astype(value.dtype), value)


def steer(
    vector: jax.Array, *, layers: Layers, site: str = "block.residual_post", scale: jax.typing.ArrayLike = 1.0
) -> Edit:
    """Adds scale x vector to a site at every position (activation addition, arXiv 2308.10248).

    Args:
      vector: broadcast with the site's value: [D], or [B, 1, D] for one in each row.
      layers: of which the site is steered.
      site: see `taps.SITES`.
      scale: of the vector.
    """
    return _Steer(check_name(site), _indices(layers), jnp.asarray(vector), jnp.asarray(scale, jnp.float32))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["layers", "positions", "values"], meta_fields=["site"]
)
@dataclasses.dataclass(frozen=True)
class _Replace:
    site: str
    layers: jax.Array | None
    positions: jax.Array | None
    values: jax.Array

    def __call__(self, site: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        if site != self.site:
            return value
        values = self.values
        if self.layers is not None and values.ndim == value.ndim + 1:  # one for each layer
            slot = jnp.argmax(self.layers == layer)
            values = jax.lax.dynamic_index_in_dim(values, slot, keepdims=False)
        new = jnp.broadcast_to(values.astype(value.dtype), value.shape)
        if self.positions is not None:
            chosen = (jnp.arange(value.shape[1])[:, None] == self.positions).any(-1)
            new = jnp.where(chosen.reshape(1, -1, *(1,) * (value.ndim - 2)), new, value)
        return _where(self.layers, layer, new, value)


def ablate(
    site: str,
    *,
    layers: Layers,
    mean: jax.Array | None = None,
    positions: Sequence[int] | jax.Array | None = None,
) -> Edit:
    """Replaces a site by zero, or by a mean.

    Args:
      site: see `taps.SITES`.
      layers: of which it is replaced.
      mean: broadcast with the site's value, such as the mean of a capture over tokens; None is zero.
      positions: columns of the call's tokens; None: all.
    """
    values = jnp.zeros(()) if mean is None else jnp.asarray(mean)
    return _Replace(check_name(site), _indices(layers), _columns(positions), values)


def patch(
    captured: Mapping[str, jax.Array],
    *,
    layers: Layers = None,
    positions: Sequence[int] | jax.Array | None = None,
) -> Edit:
    """Replaces sites by what another run had there (activation patching), in `forward` of as many tokens.

    Args:
      captured: as `capture` returned them, of sites in blocks [layers, B, T, ...] or outside.
      layers: those that were captured, in the same order.
      positions: columns of the tokens that are replaced; None: all.
    """
    indices = _indices(layers)
    edits = []
    for site, values in captured.items():
        inside = check_name(site).startswith("block.")
        if inside and indices is None:
            indices = jnp.arange(values.shape[0])
        if inside and indices is not None and len(indices) != len(values):
            raise InputError(
                f"{site!r} was captured in {len(values)} layers, and layers names {len(indices)}"
            )
        edits.append(_Replace(site, indices if inside else None, _columns(positions), values))
    return together(*edits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _KnockOut:
    layers: jax.Array | None
    heads: jax.Array | None
    queries: jax.Array | None
    keys: jax.Array

    def __call__(self, site: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        if site != ATTENTION_WEIGHTS:
            return value
        _, heads, queries, keys = value.shape
        cut = _among(self.heads, heads)[:, None, None] & _among(self.queries, queries)[:, None]
        new = jnp.where(cut & _among(self.keys, keys), 0.0, value)
        return _where(self.layers, layer, new / jnp.maximum(new.sum(-1, keepdims=True), 1e-30), value)


def knock_out(
    keys: Sequence[int],
    *,
    layers: Layers,
    heads: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
) -> Edit:
    """Keeps queries from attending to keys: these weights are zero, and the others sum to one.

    Args:
      keys: positions; in cached decoding, slots of the cache.
      layers: of which attention is cut.
      heads: query heads; None: all.
      queries: columns of the call's tokens; None: all, also those that are generated.
    """
    return _KnockOut(_indices(layers), _columns(heads), _columns(queries), jnp.asarray(keys, jnp.int32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _PruneHeads:
    pruned: jax.Array

    def __call__(self, site: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        if site != "block.attention_heads":
            return value
        here = jax.lax.dynamic_index_in_dim(self.pruned, layer, keepdims=False)
        return jnp.where(here[:, None], jnp.zeros_like(value), value)


def prune_heads(pruned: jax.Array) -> Edit:
    """Sets the outputs of heads to zero.

    Args:
      pruned: bool [L, N], True for the heads to prune.
    """
    return _PruneHeads(jnp.asarray(pruned, bool))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Together:
    edits: tuple[Any, ...]

    def __call__(self, site: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        for edit in self.edits:
            value = edit(site, layer, value)
        return value


def together(*edits: Edit) -> Edit:
    """One edit that applies several, in this order."""
    return edits[0] if len(edits) == 1 else _Together(tuple(edits))


def _where(layers: jax.Array | None, layer: jax.Array, new: jax.Array, value: jax.Array) -> jax.Array:
    return new if layers is None else jnp.where((layers == layer).any(), new, value)


def _among(chosen: jax.Array | None, count: int) -> jax.Array:
    """bool [count]: which indices are chosen; all where None."""
    if chosen is None:
        return jnp.ones(count, bool)
    return (jnp.arange(count)[:, None] == chosen).any(-1)


def _indices(layers: Layers) -> jax.Array | None:
    if layers is None:
        return None
    indices = jnp.atleast_1d(jnp.asarray(layers, jnp.int32))
    if not isinstance(indices, jax.core.Tracer) and (indices < 0).any():
        raise InputError(f"layers is {layers}; layers of an edit count from 0")
    return indices


def _columns(positions: Sequence[int] | jax.Array | None) -> jax.Array | None:
    return None if positions is None else jnp.asarray(positions, jnp.int32)


__all__ = ["SITES", "ablate", "knock_out", "patch", "prune_heads", "steer", "together"]
