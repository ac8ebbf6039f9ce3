"""Loads a checkpoint's tensors, one at a time, straight onto the device or mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.sharding import check_mesh, named, param_specs
from llama_jax.weights.check import check_tensors
from llama_jax.weights.names import HEAD_DTYPE, SCORE, Entry, entries
from llama_jax.weights.orbax import OrbaxSource
from llama_jax.weights.source import Source, quote
from llama_jax.weights.tensors import Tensors

Progress = Callable[[int, int, str], None]


def load_params(
    source: Source,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    scan_layers: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint into the parameter tree of `llama_jax`.

    Host memory holds two tensors of the checkpoint at most, beside what the device itself keeps there.

    Args:
      source: an open checkpoint.
      dtype: what every leaf becomes: float32, bfloat16 or float16. A classifier's head is float32 always.
      mesh: lay the leaves out over this mesh by `sharding.param_specs`; None is the default device.
      scan_layers: layer leaves have a leading layer axis; otherwise `params["layers"]` is a tuple of one
        tree for each layer, as the decode loop wants it.
      progress: called after each tensor with the checkpoint's bytes read so far, all of them, and the
        tensor's name.

    Returns:
      The nested dict of parameters.

    Raises:
      CheckpointError: before any data is read, naming every tensor that is missing, unexpected or of
        the wrong shape; or where the data cannot be read.
      ConfigError: for another dtype, or if the model does not divide over the mesh.
    """
    config = source.config
    wanted = sorted(check_tensors(source), key=lambda entry: _place(source, entry))
    if mesh is not None:
        check_mesh(config, mesh)
    if isinstance(source, OrbaxSource):
        return source.restore(_float_dtype(dtype), mesh, scan_layers=scan_layers, progress=progress)
    tree = _Tree(config, _float_dtype(dtype), mesh, scan_layers)
    total = sum(source.tensors[entry.name].nbytes for entry in wanted)
    done = 0
    for entry in wanted:
        array = entry.leaf.from_stored(source.read(entry.name), config, source.format)
        tree.put(entry, array)
        done += source.tensors[entry.name].nbytes
        if progress is not None:
            progress(done, total, entry.name)
    return jax.block_until_ready(tree.params)


def load_tensors(
    tensors: Tensors,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    scan_layers: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`load_params` of a model that no checkpoint holds as it is, such as one with an adapter merged."""
    config = tensors.config
    if mesh is not None:
        check_mesh(config, mesh)
    tree = _Tree(config, _float_dtype(dtype), mesh, scan_layers)
    sizes = {
        entry: math.prod(entry.leaf.shape(config)) * tensors.dtype(entry.leaf, entry.layer).itemsize
        for entry in entries(config, "hf")
    }
    done = 0
    for entry, nbytes in sizes.items():
        tree.put(entry, entry.leaf.from_stored(tensors.read(entry.leaf, entry.layer), config, "hf"))
        done += nbytes
        if progress is not None:
            progress(done, sum(sizes.values()), entry.name)
    return jax.block_until_ready(tree.params)


def _float_dtype(dtype: Any) -> np.dtype[Any]:
    names = ("float32", "bfloat16", "float16")
    try:
        if (known := jnp.dtype(dtype)).name in names:
            return known
    except TypeError:
        pass
    raise ConfigError(f"dtype is {quote(str(dtype))}; it must be one of {', '.join(names)}")


def _place(source: Source, entry: Entry) -> tuple[str, int]:
    info = source.tensors[entry.name]
    return str(info.file), info.offset


class _Tree:
    """The parameters while they are being filled."""

    def __init__(
        self, config: LlamaConfig, dtype: np.dtype[Any], mesh: Mesh | None, scan_layers: bool
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.mesh = mesh
        self.specs = param_specs(config)
        self.params: dict[str, Any] = {}
        # Without a stack, each layer is a tree of its own.
        layers: tuple[dict[str, Any], ...] = tuple({} for _ in range(config.num_hidden_layers))
        self.layers = None if scan_layers else layers
        if self.layers is not None:
            self.params["layers"] = self.layers
        self.last: jax.Array | None = None

    def put(self, entry: Entry, array: np.ndarray) -> None:
        """Moves one tensor to its place on the device."""
        leaf, layer = entry.leaf, entry.layer
        spec = _parent(self.specs, leaf.path)[leaf.path[-1]]
        if layer is None:
            dtype = HEAD_DTYPE if leaf is SCORE else self.dtype
            _parent(self.params, leaf.path)[leaf.path[-1]] = self.move(array, spec, dtype)
            return
        value = self.move(array, P(*spec[1:]), self.dtype)
        if self.layers is not None:
            _parent(self.layers[layer], leaf.path[1:])[leaf.path[-1]] = value
            return
        parent = _parent(self.params, leaf.path)
        if leaf.path[-1] not in parent:
            shape = (self.config.num_hidden_layers, *array.shape)
            parent[leaf.path[-1]] = jnp.zeros(shape, self.dtype, device=self.sharding(spec))
        parent[leaf.path[-1]] = _write_layer(parent[leaf.path[-1]], value, layer)

    def move(self, array: np.ndarray, spec: P, dtype: np.dtype[Any]) -> jax.Array:
        # Wait for the tensor before, so that no queue of them builds up in host memory.
        jax.block_until_ready(self.last)
        array = array.astype(dtype, copy=False)
        sharding = self.sharding(spec)
        if sharding is None:
            self.last = jnp.asarray(array)
        else:
            # Each process places its own shards alone, so this holds for many hosts too.
            self.last = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        return self.last

    def sharding(self, spec: P) -> NamedSharding | None:
        return None if self.mesh is None else named(self.mesh, spec)


def _parent(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Returns the dict that holds the leaf at `path`, made if it is not there."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    return tree


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stack: jax.Array, value: jax.Array, layer: int) -> jax.Array:
    """Writes one layer's leaf into the stacked one, in place."""
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
