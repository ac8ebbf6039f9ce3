"""Meshes, and THE one table of the partition specs of all parameters and activations.

The mesh axes are `data` (data parallelism, the outer axis, which may cross slow links), `fsdp` (batch and
parameters), `context` (the sequence and parameters) and `tensor` (heads, feed-forward width, vocabulary, and
between the products the sequence). A mesh may omit axes, and the same model code runs without a mesh.

The model runs in JAX's explicit-sharding mode: under `jax.set_mesh(mesh)` the type of every array includes
its sharding. Each name below ends in the letters of its dimensions (see `llama_jax`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError

AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")
PARAMS = ("fsdp", "context")  # what divides parameters and their optimizer state, besides `tensor`
# The residual stream and the norms: sequence parallelism (arXiv 2205.05198, section 4.2.2). A sublayer
# gathers its input over `tensor`, and reduce-scatters its output.
SEQUENCE = ("context", "tensor")

# Stored parameters. They are gathered over `fsdp` and `context` just before they are used.
EMBEDDING_VD = P("tensor", PARAMS)
HEAD_DV = P(PARAMS, "tensor")
SCORE_DC = P(None, None)
NORM_D = P(None)
WQ_DNH = P(PARAMS, "tensor", None)
WKV_DKH = P(PARAMS, "tensor", None)
WO_NHD = P("tensor", None, PARAMS)
GATE_UP_DF = P(PARAMS, "tensor")
DOWN_FD = P("tensor", PARAMS)
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

LAYER_SPECS = {
    "attention_norm": {"scale": NORM_D},
    "attention": {"wq": WQ_DNH, "wk": WKV_DKH, "wv": WKV_DKH, "wo": WO_NHD},
    "ffn_norm": {"scale": NORM_D},
    "feed_forward": {"w_gate": GATE_UP_DF, "w_up": GATE_UP_DF, "w_down": DOWN_FD},
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
    layers = jax.tree.map(lambda spec: P(None, *spec), LAYER_SPECS, is_leaf=is_spec) if scan_layers else None
    specs: dict[str, Any] = {
        "embed": {"embedding": EMBEDDING_VD},
        "layers": layers or (LAYER_SPECS,) * config.num_hidden_layers,
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


def make_mesh(spec: str | Mapping[str, int] = "", *, devices: Any = None) -> Mesh:
    """Makes a mesh with all four axes from a string such as `"fsdp=4,tensor=2"`.

    Args:
      spec: sizes by axis name; axes that are not named have size 1. One size may be -1, for the remaining
        devices.
      devices: the devices to use; all of `jax.devices()` by default.

    Raises:
      ConfigError: for an unknown axis, a size that is not an integer, or sizes whose product is not the
        number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(mesh_sizes(spec, len(devices), platform=devices[0].platform).values())
    axis_types = (AxisType.Explicit,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    except NotImplementedError:  # no product of a torus's sides is one of the sizes: sides must be split
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=axis_types)


def mesh_sizes(spec: str | Mapping[str, int], num_devices: int, *, platform: str = "") -> dict[str, int]:
    """The sizes of the four axes, in order, of `make_mesh` on this number of devices.

    Args:
      spec: as for `make_mesh`.
      num_devices: how many devices there are.
      platform: of the devices; for `cpu` the error says how to simulate more.

    Raises:
      ConfigError: as `make_mesh`.
    """
    given = list(_parse_mesh(spec) if isinstance(spec, str) else spec.items())
    for name, size in given:
        if [n for n, _ in given].count(name) > 1:
            raise ConfigError(f"mesh axis {name} is given twice; give each axis one size")
        if isinstance(size, bool) or not isinstance(size, int):
            raise ConfigError(f"mesh axis {name} has size {size!r}; it must be a whole number")
    sizes = dict.fromkeys(AXES, 1) | dict(given)
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise ConfigError(f"mesh axis {unknown[0]!r} is unknown; the axes are {', '.join(AXES)}")
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f"mesh axis {name} has size {size}; it must be at least 1, or -1 for the rest")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh axes {' and '.join(free)} are both -1; only one can take what is left")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed == 0:
        sizes[free[0]] = num_devices // fixed
    if math.prod(sizes.values()) != num_devices:
        shape = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        there = f"{num_devices} device{'s' * (num_devices != 1)}"
        if free:
            problem = f"{there} cannot be divided by {fixed}"
        elif fixed > num_devices:
            problem = (
                f"it needs {fixed} devices and there {'is' if num_devices == 1 else 'are'} {num_devices}"
            )
        else:
            problem = f"it takes {fixed} of {there}, and must take all (one axis may be -1, for what is left)"
        raise ConfigError(
            f"mesh {shape or 'of size 1'}: {problem}{_how_to_simulate(fixed, num_devices, platform)}"
        )
    return sizes


def _how_to_simulate(needed: int, there: int, platform: str) -> str:
    """On CPUs, how to get more devices."""
    if needed <= there or platform != "cpu":
        return ""
    return (
        f"; CPU devices can be simulated: jax.config.update('jax_num_cpu_devices', {needed}) before JAX is "
        f"first used, or the environment variable XLA_FLAGS=--xla_force_host_platform_device_count={needed}"
    )


def _parse_mesh(spec: str) -> Iterator[tuple[str, int]]:
    for part in filter(None, (part.strip() for part in spec.split(","))):
        name, _, size = part.partition("=")
        try:
            yield name.strip(), int(size)
        except ValueError:
            raise ConfigError(f"mesh part {part!r} is not AXIS=SIZE, as in fsdp=4,tensor=2") from None


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
    axes = explicit_axes()
    return math.prod(axes.get(axis, 1) for axis in BATCH)


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
    size = batch_shards()
    if batch % size:
        raise ConfigError(
            f"tokens: batch of {batch} rows does not divide over mesh axes data x fsdp of size {size}; "
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
    """Gathers a parameter over `fsdp` and `context`; it stays sharded over `tensor`.

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
