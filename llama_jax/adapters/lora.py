"""Low-rank adapters as tree functions: init / attach / split / merge (LoRA, arXiv 2106.09685).

An adapter is a separate pytree: for each target matrix `a` [L, I, r] and `b` [L, r, O], where I and O are the
matrix's input and output dimensions, each flattened to one. The matrices of experts have one per expert: `a`
[L, E, I, r] and `b` [L, E, r, O]. `attach` inserts it into the parameter tree,
where every function of this library takes it in place of plain weights; gradients, optimizers and checkpoints
see the adapter alone. The base may have any dtype, or be quantized.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.adapters import layer_trees
from llama_jax.errors import ConfigError, InputError
from llama_jax.ops.adapted import (
    PROJECTIONS,
    Adapted,
    adapter_specs,
    expert_adapter_specs,
    inputs_by_outputs,
)
from llama_jax.ops.quantization import CONTRACTED, Quantized


@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of a LoRA adapter.

    Attributes:
      rank: r, the rank of the weight update a b.
      alpha: the weight update is scaled by alpha / rank; with `rslora` by alpha / sqrt(rank).
      target_modules: patterns of the matrices to adapt, such as `wq`, `attention.*`, `w_*` or Hugging Face's
        `q_proj`; all seven by default, as QLoRA recommends.
      rslora: rank-stabilized scaling (arXiv 2312.03732).
      dora: weight-decomposed adapters (arXiv 2402.09353): the magnitude of each output is learned too.

    Raises:
      ConfigError: for an invalid rank or alpha, or a pattern that matches no matrix.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("*",)
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise ConfigError(f"adapter.rank is {self.rank!r}; it must be a whole number, at least 1")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"adapter.alpha is {self.alpha!r}; it must be a finite number above 0")
        _ = self.matrices

    @property
    def scale(self) -> float:
        """The scaling factor of the weight update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the adapted matrices.

        Raises:
          ConfigError: for a pattern that matches none.
        """
        return match_projections(self.target_modules)


def match_projections(patterns: Sequence[str]) -> tuple[str, ...]:
    """The names of the matrices that any of the patterns matches, in the order of `PROJECTIONS`.

    Raises:
      ConfigError: if there is no pattern, or one matches none.
    """
    matched = set()
    for pattern in patterns:
        found = {name for name, names in _projection_names().items() if fnmatch.filter(names, pattern)}
        if not found:
            known = [name for names in _projection_names().values() for name in (names[0], names[-1])]
            close = difflib.get_close_matches(str(pattern), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"adapter.target_modules: {pattern!r} matches no projection{hint} (use "
                f"{', '.join(PROJECTIONS)}, or Hugging Face's names "
                f"{', '.join(hf for _, hf in PROJECTIONS.values())})"
            )
        matched |= found
    if not matched:
        raise ConfigError("adapter.target_modules is empty; give patterns such as 'wq' or 'attention.*'")
    return tuple(name for name in PROJECTIONS if name in matched)


def _projection_names() -> dict[str, list[str]]:
    """For each projection, all names that a pattern can match."""
    return {
        name: [name, f"{sublayer}.{name}", f"layers.{sublayer}.{name}", hf]
        for name, (sublayer, hf) in PROJECTIONS.items()
    }


def init(settings: Lora, params: Any, key: jax.Array) -> Any:
    """Initializes an adapter to a zero weight update: `a` uniform in +-1 / sqrt(I), `b` zero.

    Args:
      settings: the matrices to adapt, and the rank.
      params: the base parameters, layers stacked; sharded over the current mesh, if there is one.
      key: a key from `jax.random.key`.

    Returns:
      `{"layers": {"attention": {"wq": {"a": f32 [L, I, r], "b": f32 [L, r, O]}, ...}, ...}}`, with DoRA
      also `magnitude` f32 [L, O]; sharded as the base's input and output dimensions are. For the matrices of
      experts `a` is [L, E, I, r] and `b` [L, E, r, O].

    Raises:
      InputError: if layers are not stacked.
      ConfigError: for DoRA on the matrices of experts.
    """
    layer_trees.require_stacked(params)
    adapter: dict[str, Any] = {}
    for name in settings.matrices:
        sublayer = PROJECTIONS[name][0]
        weight = params["layers"][sublayer][name]
        experts = _experts(params["layers"], name)
        lead, inputs, outputs = _sizes(weight, name)
        if experts:
            _refuse_dora_of_experts(name, settings.dora)
            a_spec, b_spec = expert_adapter_specs(sharding.EXPERTS_SPECS[name])
        else:
            a_spec, b_spec = adapter_specs(name)
        bound = 1 / math.sqrt(inputs)
        # A key per name: the initial values do not depend on which other matrices are adapted.
        matrix_key = jax.random.fold_in(key, list(PROJECTIONS).index(name))
        a = jax.random.uniform(matrix_key, (*lead, inputs, settings.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*lead, settings.rank, outputs), jnp.float32)
        leaves = {
            "a": sharding.constrain(a, P(None, *a_spec)),
            "b": sharding.constrain(b, P(None, *b_spec)),
        }
        if settings.dora:
            norms = jax.vmap(lambda w, n=inputs: jnp.linalg.norm(inputs_by_outputs(w, n), axis=0))(weight)
            leaves["magnitude"] = sharding.constrain(norms, P(None, b_spec[1]))
        adapter.setdefault(sublayer, {})[name] = leaves
    return {"layers": adapter}


def attach(settings: Lora, params: Any, adapter: Any) -> Any:
    """Inserts an adapter into the parameter tree: an `Adapted` in place of each adapted matrix.

    Args:
      settings: the adapter's settings.
      params: the base parameters, layers stacked or not.
      adapter: the tree of `init`, stacked.

    Raises:
      ConfigError: if the adapter's shapes do not match the base's.
    """
    check(params, adapter)

    def add_scale(leaves: Any) -> Any:
        return {**leaves, "scale": jnp.full(leaves["a"].shape[:1], settings.scale, jnp.float32)}

    scaled = {
        sublayer: {name: add_scale(leaves) for name, leaves in matrices.items()}
        for sublayer, matrices in adapter["layers"].items()
    }
    return layer_trees.map_layers(_attach_layer, params, {"layers": scaled})


def _attach_layer(layer: Any, adapter: Any) -> Any:
    adapted = {
        sublayer: {
            name: Adapted(layer[sublayer][name], **leaves, name=name) for name, leaves in matrices.items()
        }
        for sublayer, matrices in adapter.items()
    }
    return {**layer, **{sublayer: {**layer[sublayer], **adapted[sublayer]} for sublayer in adapted}}


def split(params: Any) -> tuple[Any, Any]:
    """Splits attached parameters into the base and the adapter, which is stacked if the base is."""

    def split_layer(layer: Any) -> tuple[Any, Any]:
        base, adapter = {}, {}
        for sublayer, matrices in layer.items():
            base[sublayer] = {name: w.base if isinstance(w, Adapted) else w for name, w in matrices.items()}
            adapted = {name: _adapter_leaves(w) for name, w in matrices.items() if isinstance(w, Adapted)}
            if adapted:
                adapter[sublayer] = adapted
        return base, adapter

    return layer_trees.split_layers(split_layer, params)


def merge(params: Any) -> Any:
    """Merges the adapter into the weights: W + scale a b, with DoRA rescaled to each output's magnitude.

    A quantized base becomes plain weights in its compute dtype.

    Raises:
      InputError: for per-row adapters (`attach_rows`).
    """

    def merge_matrix(weight: Adapted) -> Any:
        base = weight.base
        if weight.a.ndim == 3:
            delta = jnp.einsum("eir,ero->eio", weight.a, weight.b, precision="highest")
            inputs = weight.a.shape[1]
            matrices = jax.vmap(lambda matrix: inputs_by_outputs(matrix, inputs))(base)
            return (matrices + weight.scale * delta).astype(base.dtype)
        delta = jnp.einsum("ir,ro->io", weight.a, weight.b, precision="highest")
        full = inputs_by_outputs(base, weight.a.shape[0]) + weight.scale * delta
        if weight.magnitude is not None:
            full = full * (weight.magnitude / jnp.linalg.norm(full, axis=0))
        spec = sharding.out_sharding(sharding.MATRIX_SPECS[weight.name])
        return jnp.reshape(full, base.shape, out_sharding=spec).astype(base.dtype)

    def merge_leaf(weight: Any) -> Any:
        if not isinstance(weight, Adapted):
            return weight
        if weight.rows is not None:
            raise InputError("per-row adapters cannot be merged into one set of weights; attach one adapter")
        return jax.vmap(merge_matrix)(weight) if weight.scale.ndim else merge_matrix(weight)

    return jax.tree.map(merge_leaf, params, is_leaf=lambda x: isinstance(x, Adapted))


def attach_rows(params: Any, adapters: Sequence[tuple[Lora, Any]], rows: jax.Array) -> Any:
    """Inserts several adapters into the parameter tree, one for each row of a batch.

    Args:
      params: the base parameters, layers stacked or not.
      adapters: settings and tree of each, of any rank and target matrices; without DoRA.
      rows: int [B], the index of each row's adapter; -1 is none.

    Raises:
      InputError: if there is no adapter, or one has DoRA or adapts the matrices of experts.
      ConfigError: if an adapter is for another model.
    """
    if not adapters:
        raise InputError("there are no adapters; give a list of (settings, adapter)")
    if any(settings.dora for settings, _ in adapters):
        raise InputError(
            "an adapter with DoRA cannot be applied per row; merge it into its own copy of the weights"
        )
    layer, num_layers = layer_trees.first_layer(params)
    for _, adapter in adapters:
        check(params, adapter)
        adapted = adapter["layers"].get("feed_forward", {})
        found = [name for name in PROJECTIONS if name in adapted and _experts(layer, name)]
        if found:
            raise InputError(
                f"an adapter of {', '.join(found)} of experts cannot be applied per row; merge it into its "
                "own copy of the weights, or adapt 'attention.*' alone"
            )
    rank = max(settings.rank for settings, _ in adapters)
    rows = jnp.where(rows < 0, len(adapters), rows).astype(jnp.int32)  # the last adapter is all zeros
    scale = jnp.array([*(settings.scale for settings, _ in adapters), 0.0], jnp.float32)
    combined: dict[str, Any] = {}
    for name, (sublayer, _) in PROJECTIONS.items():
        trees = [adapter["layers"].get(sublayer, {}).get(name) for _, adapter in adapters]
        like = next((leaves for leaves in trees if leaves is not None), None)
        if like is None:
            continue
        zero = {key: jnp.zeros_like(like[key]) for key in ("a", "b")}
        padded = [leaves or zero for leaves in trees] + [zero]
        combined.setdefault(sublayer, {})[name] = {
            "a": jnp.stack([_pad(leaves["a"], 2, rank) for leaves in padded], axis=1),
            "b": jnp.stack([_pad(leaves["b"], 1, rank) for leaves in padded], axis=1),
            "scale": jnp.broadcast_to(scale, (num_layers, *scale.shape)),
            "rows": jnp.broadcast_to(rows, (num_layers, *rows.shape)),
        }
    return layer_trees.map_layers(_attach_layer, params, {"layers": combined})


def check(params: Any, adapter: Any) -> None:
    """Checks, from shapes alone, that an adapter fits the base parameters.

    Raises:
      ConfigError: naming the first matrix that does not fit; for DoRA on the matrices of experts.
    """
    layer, num_layers = layer_trees.first_layer(params)
    for sublayer, matrices in adapter["layers"].items():
        for name, leaves in matrices.items():
            weight = layer.get(sublayer, {}).get(name)
            if weight is None:
                raise ConfigError(
                    f"the adapter has {sublayer}.{name}, which the base model lacks; use the base model it "
                    "was trained on"
                )
            experts, of_adapter = _experts(layer, name), leaves["a"].shape[1:-2]
            if experts != of_adapter:
                raise ConfigError(
                    f"the adapter is for another model: {sublayer}.{name} has {_format_experts(of_adapter)}, "
                    f"the base model's {_format_experts(experts)}; use the base model it was trained on"
                )
            if experts:
                _refuse_dora_of_experts(name, "magnitude" in leaves)
            expected = (num_layers, *_sizes(weight, name)[1:])
            found = (leaves["a"].shape[0], leaves["a"].shape[-2], leaves["b"].shape[-1])
            if expected != found:
                raise ConfigError(
                    f"the adapter is for another model: {sublayer}.{name} has {found[0]} layers of {found[1]}"
                    f" x {found[2]}, the base model's {expected[0]} of {expected[1]} x {expected[2]}; use the"
                    " base model it was trained on"
                )


def _experts(layer: Any, name: str) -> tuple[int, ...]:
    """(E,) for a matrix of experts, which have one each; else ()."""
    sublayer = layer[PROJECTIONS[name][0]]
    is_experts = PROJECTIONS[name][0] == "feed_forward" and "router" in sublayer
    return sublayer["router"].shape[-1:] if is_experts else ()


def _format_experts(experts: tuple[int, ...]) -> str:
    return f"{experts[0]} experts" if experts else "no experts"


def _refuse_dora_of_experts(name: str, dora: bool) -> None:
    if dora:
        raise ConfigError(
            f"adapter.dora is not supported for {name}, a matrix of experts in this model; leave it out, or "
            "use adapter.target_modules 'attention.*'"
        )


def _adapter_leaves(weight: Adapted) -> dict[str, jax.Array]:
    leaves = {"a": weight.a, "b": weight.b}
    return leaves if weight.magnitude is None else {**leaves, "magnitude": weight.magnitude}


def _sizes(weight: Any, name: str) -> tuple[tuple[int, ...], int, int]:
    """The leading dimensions, of layers and experts, the input dimension and the output dimension."""
    summed = CONTRACTED[name]
    if isinstance(weight, Quantized):
        shape, lead = weight.shape, weight.scale.shape[:-2]
    else:
        dimensions = 3 if name in ("wq", "wk", "wv", "wo") else 2
        shape, lead = weight.shape[-dimensions:], weight.shape[:-dimensions]
    inputs = math.prod(shape[axis] for axis in summed)
    return lead, inputs, math.prod(shape) // inputs


def _pad(x: jax.Array, axis: int, size: int) -> jax.Array:
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])
