"""THE one table of the partition specs of all parameters and activations, and how arrays take them.

The mesh axes are `data` (data parallelism, the outer axis, which may cross slow links), `fsdp` (batch and
parameters), `expert` (the experts of a mixture; elsewhere as `fsdp`), `context` (the sequence and parameters)
and `tensor` (heads, feed-forward width, vocabulary, and between the products the sequence). A mesh may omit
axes, and the same model code runs without a mesh.

The model runs in JAX's explicit-sharding mode: under `jax.set_mesh(mesh)` the type of every array includes
its sharding. Each name below ends in the letters of its dimensions (see `llama_jax`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError

BATCH = ("data", "fsdp", "expert")
# What divides parameters and their optimizer state, besides `tensor`; of experts, whose dimension E `expert`
# divides, the last two.
PARAMS = ("fsdp", "expert", "context")
EXPERT_PARAMS = ("fsdp", "context")
# The residual stream and the norms: sequence parallelism (arXiv 2205.05198, section 4.2.2). A sublayer
# gathers its input over `tensor`, and reduce-scatters its output.
SEQUENCE = ("context", "tensor")

# Stored parameters. They are gathered over `fsdp` and `context` just before they are used.
EMBEDDING_VD = P("tensor", PARAMS)
HEAD_DV = P(PARAMS, "tensor")
SCORE_DC = P(None, None)
NORM_D = P(None)
NORM_H = P(None)
BIAS_NH = P("tensor", None)
BIAS_D = P(None)
BIAS_F = P("tensor")
WQ_DNH = P(PARAMS, "tensor", None)
WKV_DKH = P(PARAMS, "tensor", None)
WO_NHD = P("tensor", None, PARAMS)
GATE_UP_DF = P(PARAMS, "tensor")
DOWN_FD = P("tensor", PARAMS)
ROUTER_DE = P(PARAMS, None)
EXPERTS_EDF = P("expert", EXPERT_PARAMS, "tensor")
EXPERTS_EFD = P("expert", "tensor", EXPERT_PARAMS)
# Adapters. The specs of LoRA follow from those of the adapted matrices (`ops.adapted.adapter_specs`).
BOTTLENECK_DOWN_DM = P(PARAMS, None)
BOTTLENECK_UP_MD = P(None, PARAMS)
PREFIX_KPH = P("tensor", None, None)

# Activations.
TOKENS_BT = P(BATCH, "context")
ACT_BTD = P(BATCH, SEQUENCE, None)
GATHERED_BTD = P(BATCH, "context", None)  # what a product over a `tensor`-sharded weight reads
ACT_BTF = P(BATCH, "context", "tensor")
ACT_BTNH = P(BATCH, "context", "tensor", None)
LOGITS_BTV = P(BATCH, "context", "tensor")
LOGITS_BV = P(BATCH, None)  # logits of one position; V is not sharded, since sampling reads all of it
QUERIES_BKGTH = P(BATCH, "tensor", None, "context", None)
CACHE_BKSH = P(BATCH, "tensor", None, None)
STRIPED_BKSH = P(BATCH, "tensor", "context", None)  # a cache on a mesh with `context`: `ops.striped_cache`
ROWS_B = P(BATCH)

BIASES = ("bq", "bk", "bv", "bo", "b_gate", "b_up", "b_down")
ATTENTION_SPECS = {"wq": WQ_DNH, "wk": WKV_DKH, "wv": WKV_DKH, "wo": WO_NHD}
FEED_FORWARD_SPECS = {"w_gate": GATE_UP_DF, "w_up": GATE_UP_DF, "w_down": DOWN_FD}
EXPERTS_SPECS = {"router": ROUTER_DE, "w_gate": EXPERTS_EDF, "w_up": EXPERTS_EDF, "w_down": EXPERTS_EFD}
MATRIX_SPECS = ATTENTION_SPECS | FEED_FORWARD_SPECS


def layer_specs(config: LlamaConfig) -> dict[str, Any]:
    """Partition specs of the parameters of one layer."""
    attention: dict[str, Any] = dict(ATTENTION_SPECS)
    if config.qkv_bias:
        attention |= {"bq": BIAS_NH, "bk": BIAS_NH, "bv": BIAS_NH}
    if config.out_bias:
        attention["bo"] = BIAS_D
    if config.qk_norm:
        attention |= {"q_norm": NORM_H, "k_norm": NORM_H}
    feed_forward: dict[str, Any] = dict(EXPERTS_SPECS if config.num_experts else FEED_FORWARD_SPECS)
    if config.mlp_bias:
        feed_forward |= {"b_gate": BIAS_F, "b_up": BIAS_F, "b_down": BIAS_D}
    return {
        "attention_norm": {"scale": NORM_D},
        "attention": attention,
        "ffn_norm": {"scale": NORM_D},
        "feed_forward": feed_forward,
    }


def param_specs(config: LlamaConfig, *, scan_layers: bool = True) -> dict[str, Any]:
    """Partition specs of the parameter tree.

    Args:
      config: the model. With tied embeddings there is no `lm_head`; a classifier has `score` instead.
      scan_layers: whether layer leaves are stacked, with a leading layer axis that is not sharded; otherwise
        `layers` is a tuple of one tree per layer.

    Returns:
      A tree like the parameters, with a `PartitionSpec` at each leaf.
    """
    layer = layer_specs(config)
    stacked = jax.tree.map(lambda spec: P(None, *spec), layer, is_leaf=is_spec)
    specs: dict[str, Any] = {
        "embed": {"embedding": EMBEDDING_VD},
        "layers": stacked if scan_layers else (layer,) * config.num_hidden_layers,
        "final_norm": {"scale": NORM_D},
    }
    if config.has_output:
        specs["lm_head"] = {"kernel": HEAD_DV}
    if config.labels:
        specs["score"] = {"kernel": SCORE_DC}
    return specs


def is_spec(x: Any) -> bool:
    """The `is_leaf` of a tree of specs: JAX treats a `PartitionSpec` as a pytree node."""
    return isinstance(x, P)


def check_mesh(config: LlamaConfig, mesh: Mesh | AbstractMesh) -> None:
    """Checks that the mesh axes divide the dimensions of the parameters that they shard.

    Raises:
      ConfigError: naming each tensor, dimension and axis that do not divide, and the sizes that would.
    """
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))
    dims = {
        "vocab_size": (config.vocab_size, ("tensor",), "embed.embedding"),
        "hidden_size": (config.hidden_size, PARAMS, "embed.embedding, attention.wq"),
        "num_attention_heads": (config.num_attention_heads, ("tensor",), "attention.wq"),
        "num_key_value_heads": (config.num_key_value_heads, ("tensor",), "attention.wk"),
        "intermediate_size": (config.intermediate_size, ("tensor",), "feed_forward.w_gate"),
        "num_experts": (config.num_experts, ("expert",), "feed_forward.w_gate"),
    }
    problems = []
    for field, (value, axes, tensor) in dims.items():
        size = math.prod(sizes.get(axis, 1) for axis in axes)
        if value % size:
            over = [axis for axis in axes if sizes.get(axis, 1) > 1]
            fits = [n for n in range(1, max(sizes.values()) + 1) if value % n == 0]
            padded = -(-value // size) * size
            hint = f"; {padded} rows would too: train with model.vocab_size, or convert with --vocab-size"
            problems.append(
                f"{tensor}: {field} {value} does not divide over axis {' x '.join(over)} of size {size} "
                f"(sizes that would: {', '.join(map(str, fits))}{hint if field == 'vocab_size' else ''})"
            )
    if problems:
        raise ConfigError("mesh does not fit the model: " + "; ".join(problems))


def batch_shards() -> int:
    """The number of parts that the batch axes of the current mesh divide a batch into; 1 without a mesh."""
    return batch_parts(explicit_axes())


def batch_parts(sizes: Mapping[str, int]) -> int:
    """The number of parts that a mesh with these sizes divides a batch into."""
    return math.prod(sizes.get(axis, 1) for axis in BATCH)


def batch_axes(sizes: Mapping[str, int], prefix: str = "") -> str:
    """For messages, the batch axes of a mesh with these sizes."""
    return " x ".join(prefix + axis for axis in BATCH if axis in sizes)


def filled_rows(batch: int, copies: int = 1) -> int:
    """The number of rows to compute for a batch: with more of them, those of a device may be fewer.

    Args:
      batch: B. If the batch axes of the current mesh do not divide B * copies, it would be replicated.
      copies: rows that are made of each.

    Returns:
      The smallest number that they divide, if that leaves each device fewer rows; or B.
    """
    size = batch_shards()
    unit = size // math.gcd(size, copies)
    filled = -(-batch // unit) * unit
    return filled if filled < batch * size else batch


def check_batch(batch: int) -> None:
    """Checks that the batch axes of the current mesh divide the batch size.

    Raises:
      ConfigError: naming the axes and the batch sizes that would work.
    """
    size, axes = batch_shards(), batch_axes(explicit_axes())
    if batch % size:
        raise ConfigError(
            f"tokens: batch of {batch} rows does not divide over mesh axes {axes} of size {size}; "
            f"use a multiple of {size}, for instance {-(-batch // size) * size}"
        )


def shard_params(params: Any, mesh: Mesh, config: LlamaConfig) -> Any:
    """Shards parameters, stacked or not, over `mesh` by the table above.

    Raises:
      ConfigError: for a dimension that its axis does not divide.
    """
    check_mesh(config, mesh)
    specs = param_specs(config, scan_layers=isinstance(params["layers"], Mapping))
    return jax.tree.map(lambda x, spec: jax.device_put(x, named(mesh, spec)), params, specs)


def explicit_axes() -> dict[str, int]:
    """Sizes of the explicit axes of the current mesh; empty without a mesh, and inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }


def manual_size(axis: str) -> int:
    """Inside a `shard_map` over this mesh axis, its size; elsewhere 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """`jax.set_mesh(mesh)`, or a null context for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a tree are sharded over; None without one."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh)), None)


def out_sharding(spec: P, shape: tuple[int, ...] | None = None) -> P | None:
    """`spec` without the axes that the current mesh does not have; None if it has no explicit axes.

    None is the `out_sharding` of an operation without a mesh, under an automatic mesh and inside `shard_map`,
    so the same call works everywhere.

    Args:
      spec: a partition spec of the table above.
      shape: the shape of the array. A sequence dimension that `context` does not divide (decoding's single
        position), and a batch that `data` x `fsdp` does not divide (a single prompt), are then replicated. A
        sequence that `context` divides and `context` x `tensor` does not is sharded over `context` alone.
    """
    axes = explicit_axes()
    if not axes:
        return None
    if shape is not None:
        spec = P(*(_divided(entry, size, axes) for entry, size in zip(spec, shape, strict=True)))
    return restrict(spec, axes)


def _divided(entry: Any, size: int, axes: Mapping[str, int]) -> Any:
    """The entry of a dimension of this size without the axes that do not divide it."""
    if entry == SEQUENCE and (axes.get("tensor", 1) == 1 or size % _axis_size(entry, axes)):
        entry = "context"
    return None if entry in ("context", BATCH) and size % _axis_size(entry, axes) else entry


def _axis_size(entry: Any, axes: Mapping[str, int]) -> int:
    """The number of shards of a dimension with this entry in its spec."""
    return math.prod(axes.get(axis, 1) for axis in (entry if isinstance(entry, tuple) else (entry,)))


def restrict(spec: P, names: Iterable[str]) -> P:
    """`spec` without the axes that are not in `names`."""

    def restrict_entry(entry: Any) -> Any:
        axes = tuple(n for n in (entry if isinstance(entry, tuple) else (entry,)) if n in names)
        return axes[0] if len(axes) == 1 else (axes or None)

    return P(*map(restrict_entry, spec))


def named(mesh: Mesh, spec: P) -> NamedSharding:
    """`spec` on `mesh`, without the axes that the mesh does not have."""
    return NamedSharding(mesh, restrict(spec, mesh.axis_names))


def spec_of(x: jax.Array) -> P | None:
    """The partition spec of `x` on the current explicit mesh, as an `out_sharding`; None without a mesh."""
    return jax.typeof(x).sharding.spec if explicit_axes() else None


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """Reshards `x` to `spec` on the current mesh; returns it unchanged without a mesh."""
    sharding = out_sharding(spec, x.shape)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def over_batch(x: jax.Array) -> jax.Array:
    """Shards x [B, ...] over the batch axes only."""
    return constrain(x, P(BATCH, *(None,) * (x.ndim - 1)))


def gather(weight: jax.Array, spec: P) -> jax.Array:
    """Gathers a parameter over `fsdp`, `expert` and `context`; it stays sharded over `tensor`.

    Cast the weight to the compute dtype first: the gather then moves half the bytes.
    """
    return constrain(weight, P(*(None if entry == PARAMS else entry for entry in spec)))


def is_sequence_parallel(x: jax.Array) -> bool:
    """Whether the mesh axis `tensor` shards dimension T of x [B, T, ...]."""
    spec = spec_of(x)
    return spec is not None and "tensor" in axes_of(spec[1])


def gather_sequence(x: jax.Array) -> jax.Array:
    """Gathers x [B, T, ...] over `tensor`, where that shards T."""
    if not is_sequence_parallel(x):
        return x
    spec = spec_of(x)
    assert spec is not None
    return jax.sharding.reshard(x, P(spec[0], restrict(P(spec[1]), ("context",))[0], *spec[2:]))


def axes_of(entry: Any) -> tuple[str, ...]:
    """The axes of an entry of a spec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)
