"""Low-rank adapters as tree functions: init / attach / split / merge (LoRA, arXiv 2106.09685).

An adapter is a small tree beside the parameters: for each chosen matrix `a` [L, I, r] and `b` [L, r, O], over
its inputs and outputs each taken as one dimension. `attach` puts both into the parameter tree, where every
function of this library takes them as it takes plain weights; gradients, optimizers and checkpoints are
handed the adapter alone. The base may be of any precision, quantised too.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.adapters import layer_trees
from llama_jax.errors import ConfigError, InputError
from llama_jax.ops.adapted import PROJECTIONS, Adapted, inputs_by_outputs, specs
from llama_jax.ops.quantization import SUMMED, Quantized


@dataclasses.dataclass(frozen=True)
class Lora:
    """What an adapter looks like.

    Attributes:
      rank: r, the rank of what is learned.
      alpha: the learned product a b counts alpha / rank times; times alpha / sqrt(rank) with `rslora`.
      target_modules: patterns of the matrices that get one, such as `wq`, `attention.*`, `w_*` or Hugging Face's
        `q_proj`; all seven by default, as QLoRA recommends.
      rslora: rank-stabilised scaling (arXiv 2312.03732).
      dora: weight-decomposed adapters (arXiv 2402.09353): each output also learns its magnitude.

    Raises:
      ConfigError: for a rank or alpha that cannot work, or a pattern that matches no matrix.
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
        """How much the learned product counts."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the matrices that get an adapter.

        Raises:
          ConfigError: for a pattern that matches none.
        """
        return matching(self.target_modules)


def matching(patterns: Sequence[str], where: str = "adapter.target_modules") -> tuple[str, ...]:
    """The names of the matrices that any of the patterns matches, in the order of `PROJECTIONS`.

    Raises:
      ConfigError: if there is no pattern, or one matches none.
    """
    chosen = set()
    for pattern in patterns:
        found = {name for name, names in _spelled().items() if fnmatch.filter(names, pattern)}
        if not found:
            known = [name for names in _spelled().values() for name in (names[0], names[-1])]
            close = difflib.get_close_matches(str(pattern), known, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(
                f"{where}: {pattern!r} matches no projection{meant} (they are {', '.join(PROJECTIONS)}; or, "
                f"as Hugging Face calls them, {', '.join(hf for _, hf in PROJECTIONS.values())})"
            )
        chosen |= found
    if not chosen:
        raise ConfigError(f"{where} is empty; give patterns such as 'wq' or 'attention.*'")
    return tuple(name for name in PROJECTIONS if name in chosen)


def _spelled() -> dict[str, list[str]]:
    return {
        name: [name, f"{part}.{name}", f"layers.{part}.{name}", hf]
        for name, (part, hf) in PROJECTIONS.items()
    }


def init(settings: Lora, params: Any, key: jax.Array) -> Any:
    """An adapter that changes nothing yet: `a` uniform in +-1 / sqrt(I), `b` zero.

    Args:
      settings: which matrices, and what rank.
      params: the base, layers stacked; laid out over the current mesh, if there is one.
      key: a key from `jax.random.key`.

    Returns:
      `{"layers": {"attention": {"wq": {"a": f32 [L, I, r], "b": f32 [L, r, O]}, ...}, ...}}`, with DoRA
      also `magnitude` f32 [L, O]; laid out as the base's inputs and outputs are.

    Raises:
      InputError: if layers are not stacked.
    """
    layer_trees.require_stacked(params)
    made: dict[str, Any] = {}
    for name in settings.matrices:
        part = PROJECTIONS[name][0]
        weight = params["layers"][part][name]
        layers, inputs, outputs = _sizes(weight, name)
        into, out = specs(name)
        bound = 1 / math.sqrt(inputs)
        # One key for each name, so that choosing other matrices changes none of these.
        own = jax.random.fold_in(key, list(PROJECTIONS).index(name))
        a = jax.random.uniform(own, (layers, inputs, settings.rank), jnp.float32, -bound, bound)
        leaf = {
            "a": sharding.constrain(a, P(None, *into)),
            "b": sharding.constrain(jnp.zeros((layers, settings.rank, outputs), jnp.float32), P(None, *out)),
        }
        if settings.dora:
            norms = jax.vmap(lambda w, n=inputs: jnp.linalg.norm(inputs_by_outputs(w, n), axis=0))(weight)
            leaf["magnitude"] = sharding.constrain(norms, P(None, out[1]))
        made.setdefault(part, {})[name] = leaf
    return {"layers": made}


def attach(settings: Lora, params: Any, adapter: Any) -> Any:
    """The parameters with an adapter, `Adapted` in the place of each matrix that has one.

    Args:
      settings: what the adapter was made with.
      params: the base, stacked or not.
      adapter: the tree of `init`, stacked.

    Raises:
      ConfigError: if the adapter's shapes are not those of this base.
    """
    check(params, adapter)

    def put(layer: Any, own: Any) -> Any:
        made = dict(layer)
        for part, matrices in own.items():
            made[part] = dict(layer[part])
            for name, leaf in matrices.items():
                scale = jnp.full(leaf["a"].shape[:-2], settings.scale, jnp.float32)
                made[part][name] = Adapted(layer[part][name], **leaf, scale=scale, name=name)
        return made

    return layer_trees.put(params, adapter, put)


def split(params: Any) -> tuple[Any, Any]:
    """Takes attached parameters apart: the base, and the adapter with its layers as the base's are."""
    base = jax.tree.map(lambda w: w.base if isinstance(w, Adapted) else w, params, is_leaf=_is_adapted)

    def taken(layer: Any) -> Any:
        parts = {}
        for part, matrices in layer.items():
            held = {name: _leaves(w) for name, w in matrices.items() if isinstance(w, Adapted)}
            if held:
                parts[part] = held
        return parts

    return base, layer_trees.take(params, lambda layer: (None, taken(layer)))[1]


def merge(params: Any) -> Any:
    """Attached parameters as plain ones: W + scale a b, and with DoRA each output at its magnitude.

    A quantised base is merged in its compute dtype.

    Raises:
      InputError: where rows have adapters of their own.
    """

    def one(weight: Adapted) -> Any:
        if weight.rows is not None:
            raise InputError("several adapters, chosen by row, cannot be merged into one set of weights")
        base = weight.base
        delta = jnp.einsum("ir,ro->io", weight.a, weight.b, precision="highest")
        full = inputs_by_outputs(base, weight.a.shape[0]) + weight.scale * delta
        if weight.magnitude is not None:
            full = full * (weight.magnitude / jnp.linalg.norm(full, axis=0))
        # Back to the matrix's own dimensions, laid out as it was.
        spec = sharding.out_sharding(sharding.LAYER_SPECS[PROJECTIONS[weight.name][0]][weight.name])
        return jnp.reshape(full, base.shape, out_sharding=spec).astype(base.dtype)

    def layer(tree: Any, stacked: bool) -> Any:
        made = dict(tree)
        for part, matrices in tree.items():
            made[part] = {
                name: (jax.vmap(one) if stacked else one)(w) if isinstance(w, Adapted) else w
                for name, w in matrices.items()
            }
        return made

    layers = params["layers"]
    if isinstance(layers, Mapping):
        return {**params, "layers": layer(layers, True)}
    return {**params, "layers": tuple(layer(tree, False) for tree in layers)}


def attach_rows(params: Any, adapters: Sequence[tuple[Lora, Any]], rows: jax.Array) -> Any:
    """Parameters with several adapters, each row of a batch having its own.

    Args:
      params: the base, stacked or not.
      adapters: settings and tree of each; of any ranks and matrices, none with DoRA.
      rows: int [B], the adapter of each row; -1 is none.

    Raises:
      InputError: for no adapter, or one with DoRA.
      ConfigError: if an adapter is of another model.
    """
    if not adapters:
        raise InputError("there are no adapters; give a list of (settings, adapter)")
    if any(settings.dora for settings, _ in adapters):
        raise InputError("an adapter with DoRA cannot be chosen by row; merge it into weights of its own")
    for _, adapter in adapters:
        check(params, adapter)
    rank = max(settings.rank for settings, _ in adapters)
    layers = params["layers"]
    stacked = isinstance(layers, Mapping)
    count = jax.tree.leaves(layers)[0].shape[0] if stacked else len(layers)
    rows = jnp.where(rows < 0, len(adapters), rows).astype(jnp.int32)  # the last one is all zeros
    made: dict[str, Any] = {}
    for name, (part, _) in PROJECTIONS.items():
        held = [adapter["layers"].get(part, {}).get(name) for _, adapter in adapters]
        like = next((leaf for leaf in held if leaf is not None), None)
        if like is None:
            continue
        zero = {key: jnp.zeros_like(like[key]) for key in ("a", "b")}
        several = [leaf or zero for leaf in held] + [zero]
        scales = [settings.scale for settings, _ in adapters] + [0.0]
        made.setdefault(part, {})[name] = {
            "a": jnp.stack([_padded(leaf["a"], 2, rank) for leaf in several], axis=1),
            "b": jnp.stack([_padded(leaf["b"], 1, rank) for leaf in several], axis=1),
            "scale": jnp.broadcast_to(jnp.array(scales, jnp.float32), (count, len(scales))),
            "rows": jnp.broadcast_to(rows, (count, *rows.shape)),
        }

    def put(layer: Any, chosen: Any) -> Any:
        return {
            part: {
                name: Adapted(w, **chosen[part][name], name=name) if name in chosen.get(part, {}) else w
                for name, w in matrices.items()
            }
            for part, matrices in layer.items()
        }

    if stacked:
        return {**params, "layers": put(layers, made)}
    each = (jax.tree.map(lambda x, i=i: x[i], made) for i in range(count))
    return {**params, "layers": tuple(put(layer, own) for layer, own in zip(layers, each, strict=True))}


def check(params: Any, adapter: Any) -> None:
    """Checks by shapes alone that an adapter belongs to a base.

    Raises:
      ConfigError: naming the first matrix that does not fit.
    """
    layers = params["layers"]
    first = layers if isinstance(layers, Mapping) else layers[0]
    for part, matrices in adapter["layers"].items():
        for name, leaf in matrices.items():
            weight = first.get(part, {}).get(name)
            if weight is None:
                raise ConfigError(f"the adapter has {part}.{name}, which the model lacks; give its own base")
            count, inputs, outputs = _sizes(weight, name)
            want = (count if isinstance(layers, Mapping) else len(layers), inputs, outputs)
            found = (leaf["a"].shape[0], leaf["a"].shape[1], leaf["b"].shape[2])
            if want != found:
                raise ConfigError(
                    f"the adapter is for another model: {part}.{name} has {found[0]} layers of {found[1]} x "
                    f"{found[2]}, the base's {want[0]} of {want[1]} x {want[2]}; give its own base"
                )


def _is_adapted(x: Any) -> bool:
    return isinstance(x, Adapted)


def _leaves(weight: Adapted) -> dict[str, jax.Array]:
    held = {"a": weight.a, "b": weight.b}
    return held if weight.magnitude is None else {**held, "magnitude": weight.magnitude}


def _sizes(weight: Any, name: str) -> tuple[int, int, int]:
    """Layers (1 where they are not stacked), inputs and outputs of a matrix."""
    summed = SUMMED[name]
    if isinstance(weight, Quantized):
        shape, lead = weight.shape, weight.scale.shape[:-2]
    else:
        dimensions = 3 if name in ("wq", "wk", "wv", "wo") else 2
        shape, lead = weight.shape[-dimensions:], weight.shape[:-dimensions]
    inputs = math.prod(shape[axis] for axis in summed)
    return math.prod(lead), inputs, math.prod(shape) // inputs


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])
