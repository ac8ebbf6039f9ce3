"""Named places in a forward pass, whose values can be captured, and replaced by an edit.

A block calls `tap(site, value)` at each of its sites and goes on with the result. Without captures and edits
that is the identity, and leaves no trace in the compiled program.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError, InputError

# A pure function (site, layer, value) -> value of the same shape and dtype. `site` is a string, `layer` an
# int32 [], -1 outside the blocks, and traced where layers are scanned.
Edit = Callable[[str, jax.Array, jax.Array], jax.Array]

Tapping = Callable[[str, jax.Array], jax.Array]  # (site, value) -> the value to go on with: a `Tap`
EDIT = "edit"  # among parameters: an edit, as a pytree
ATTENTION_WEIGHTS = "block.attention_weights"
# What each site holds, in the order of the computation; block sites once in each layer.
SITES: Mapping[str, str] = {
    "embedding": "[B, T, D], embedded tokens",
    "block.residual_pre": "[B, T, D], the input of the block",
    "block.q": "[B, T, N, H], queries after rotation",
    "block.k": "[B, T, K, H], keys after rotation",
    "block.v": "[B, T, K, H], values",
    ATTENTION_WEIGHTS: "f32 [B, N, T, S], softmax over keys, with a prefix's first; backend `xla` only",
    "block.attention_heads": "[B, T, N, H], the output of each head",
    "block.attention_out": "[B, T, D], the output of attention, before it is added",
    "block.residual_mid": "[B, T, D], the residual stream between attention and feed-forward",
    "block.gate": "[B, T, F], before the activation; not in a mixture of experts",
    "block.up": "[B, T, F]; not in a mixture of experts",
    "block.router": "f32 [B, T, E], the router's logits; only in a mixture of experts",
    "block.ffn_out": "[B, T, D], the output of the feed-forward layer, before it is added",
    "block.residual_post": "[B, T, D], the output of the block",
    "final_norm": "[B, T, D], what the output projection reads",
    "logits": "f32 [B, T, V]",
}


def sites(config: LlamaConfig) -> dict[str, str]:
    """The sites of a model, in the order of its computation, with the shape of each."""
    missing = {"block.gate", "block.up"} if config.num_experts else {"block.router"}
    return {name: shape for name, shape in SITES.items() if name not in missing}


def check_sites(config: LlamaConfig, names: Collection[str]) -> None:
    """Checks that a model has these sites.

    Raises:
      InputError: for an unknown one, with those that there are.
    """
    known = sites(config)
    for name in names:
        _check_known(name, known, "this model has")


def check_name(site: str) -> str:
    """A site's name, if some model has it.

    Raises:
      InputError: for an unknown one.
    """
    _check_known(site, SITES, "there are")
    return site


def _check_known(name: str, known: Mapping[str, str], listing: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"site {name!r} is unknown{hint}; {listing} {', '.join(known)}")


def as_edit(edit: Edit | None) -> Any:
    """An edit as a pytree, whose arrays are arguments of a compiled program; None stays None.

    A function that is no pytree is a part of the program: another function compiles again. Give one with
    other arrays as `jax.tree_util.Partial(function, ...)`, or as a registered dataclass, which does not.

    Raises:
      ConfigError: for what cannot be called.
    """
    if edit is None:
        return None
    if not callable(edit):
        raise ConfigError(
            f"edit is {type(edit).__name__}; it must be a function (site, layer, value) -> value"
        )
    return jax.tree_util.Partial(edit) if jax.tree_util.all_leaves([edit]) else edit


def with_edit(params: Any, edit: Edit | None) -> Any:
    """Parameters with an edit, for every function of this library that takes parameters.

    Args:
      params: the parameter tree; an edit that it has is applied first.
      edit: a pure function, see `Edit`; None leaves the parameters as they are.
    """
    if (given := as_edit(edit)) is None:
        return params
    first = params.get(EDIT)
    return {**params, EDIT: given if first is None else jax.tree_util.Partial(_both, first, given)}


def _both(first: Edit, second: Edit, site: str, layer: jax.Array, value: jax.Array) -> jax.Array:
    return second(site, layer, first(site, layer, value))


def edited(params: Any, site: str, value: jax.Array) -> jax.Array:
    """The value of a site outside the blocks, after the parameters' edit, if they have one."""
    return Tap(params.get(EDIT))(site, value)


@dataclasses.dataclass
class Tap:
    """Edits and captures the sites of one layer while it is traced.

    Attributes:
      edit: replaces values; None replaces none.
      wanted: the sites to capture.
      layer: int32 [], -1 outside the blocks.
      found: what was captured, after edits.
    """

    edit: Edit | None = None
    wanted: frozenset[str] = frozenset()
    layer: Any = -1
    found: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def __call__(self, site: str, value: jax.Array) -> jax.Array:
        """`value`, or what the edit makes of it.

        Raises:
          InputError: if that has another shape or dtype.
        """
        if self.edit is not None:
            new = self.edit(site, jnp.asarray(self.layer, jnp.int32), value)
            if jnp.shape(new) != value.shape or jnp.result_type(new) != value.dtype:
                raise InputError(
                    f"edit returned {jnp.result_type(new)} {list(jnp.shape(new))} at {site!r}, which is "
                    f"{value.dtype} {list(value.shape)}; return a value of that shape and dtype"
                )
            value = jnp.asarray(new)
        if site in self.wanted:
            self.found[site] = value
        return value


@dataclasses.dataclass(frozen=True)
class Taps:
    """The edit and captures of a forward pass.

    Attributes:
      edit: see `Tap`.
      wanted: the sites to capture.
      layers: of which to capture block sites; None for all.
    """

    edit: Edit | None = None
    wanted: frozenset[str] = frozenset()
    layers: tuple[int, ...] | None = None

    def at(self, layer: Any) -> Tap:
        """The tap of a layer."""
        return Tap(self.edit, frozenset(name for name in self.wanted if name.startswith("block.")), layer)


def untapped(site: str, value: jax.Array) -> jax.Array:
    """The tap of a forward pass without edits and captures: the identity."""
    del site
    return value


def tap_weights(tap: Tapping, weights: jax.Array) -> jax.Array:
    """Attention weights [B, K, G, T, S] after the tap, which has them as [B, N, T, S]."""
    batch, kv_heads, groups, length, slots = weights.shape
    of_heads = tap(ATTENTION_WEIGHTS, weights.reshape(batch, kv_heads * groups, length, slots))
    return of_heads.reshape(weights.shape)
