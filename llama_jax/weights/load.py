"""Loads a checkpoint's tensors one at a time, directly onto the device or mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.sharding import check_mesh, named, param_specs, restrict
from llama_jax.weights.names import HEAD_DTYPE, SCORE, Entry, Format, Leaf, entries
from llama_jax.weights.orbax import OrbaxSource
from llama_jax.weights.row_shards import ReadRows, RowShards
from llama_jax.weights.source import Progress, Source, quote
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.validation import validate_tensors


def load_params(
    source: Source,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    scan_layers: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loads a checkpoint into a parameter tree.

    Peak host memory is two tensors of the checkpoint, besides the device's own allocations. On a mesh of
    several processes each reads its share of every matrix: together they read the checkpoint once.

    Args:
      source: an open checkpoint.
      dtype: dtype of every leaf: float32, bfloat16 or float16. A classifier head is always float32.
      mesh: shard the leaves over this mesh by `sharding.param_specs`; None is the default device.
      scan_layers: stack layer leaves along a leading layer axis; otherwise `params["layers"]` is a tuple of
        one tree per layer, which the decode loop requires.
      progress: called after each tensor with the bytes read so far, the total, and the tensor's name.

    Returns:
      The nested dict of parameters.

    Raises:
      CheckpointError: before any data is read, naming every tensor that is missing, unexpected or of
        the wrong shape; or if the data cannot be read.
      ConfigError: if the dtype is not supported, or the model does not divide over the mesh.
    """
    config = source.config
    required = sorted(validate_tensors(source), key=lambda entry: _file_position(source, entry))
    if mesh is not None:
        check_mesh(config, mesh)
    if isinstance(source, OrbaxSource):
        return source.restore(_float_dtype(dtype), mesh, scan_layers=scan_layers, progress=progress)
    builder = _ParamsBuilder(config, _float_dtype(dtype), mesh, scan_layers)
    sizes = {entry: source.tensors[entry.name].nbytes for entry in required}

    def read(entry: Entry) -> np.ndarray:
        return entry.leaf.from_stored(source.read(entry.name), config, source.format)

    def read_rows(entry: Entry, begin: int, end: int) -> np.ndarray:
        return source.read_rows(entry.name, begin, end)

    return _build(builder, sizes, read, read_rows, source.format, progress)


def load_tensors(
    tensors: Tensors,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    scan_layers: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Like `load_params`, for tensors derived from a checkpoint, such as a model with a merged adapter."""
    config = tensors.config
    if mesh is not None:
        check_mesh(config, mesh)
    builder = _ParamsBuilder(config, _float_dtype(dtype), mesh, scan_layers)
    sizes = {
        entry: math.prod(entry.leaf.shape(config)) * tensors.dtype(entry.leaf, entry.layer).itemsize
        for entry in entries(config, "hf")
    }

    def read(entry: Entry) -> np.ndarray:
        return entry.leaf.from_stored(tensors.read(entry.leaf, entry.layer), config, "hf")

    def read_rows(entry: Entry, begin: int, end: int) -> np.ndarray:
        return tensors.read_rows(entry.leaf, entry.layer, begin, end)

    return _build(builder, sizes, read, read_rows, "hf", progress)


def _build(
    builder: _ParamsBuilder,
    sizes: Mapping[Entry, int],
    read: Callable[[Entry], np.ndarray],
    read_rows: Callable[[Entry, int, int], np.ndarray],
    format: Format,
    progress: Progress | None,
) -> dict[str, Any]:
    """Reads and adds the tensors in the order of `sizes`, which maps each to its bytes for `progress`.

    Of several processes each reads its share of the rows of every matrix, in the layout of `format`.
    """
    done, total = 0, sum(sizes.values())
    by_rows = builder.mesh is not None and builder.mesh.is_multi_process
    for entry, nbytes in sizes.items():
        # Matrices of experts are read whole: the devices of a process may have all of some experts.
        by_rows_too = by_rows and entry.leaf.expert is None
        if by_rows_too and len(entry.leaf.stored_shape(builder.config, format)) > 1:
            builder.add_rows(entry, functools.partial(read_rows, entry), format)
        else:
            builder.add(entry, read(entry))
        done += nbytes
        if progress is not None:
            progress(done, total, entry.name)
    return jax.block_until_ready(builder.params)


def _float_dtype(dtype: Any) -> np.dtype[Any]:
    names = ("float32", "bfloat16", "float16")
    try:
        if (parsed := jnp.dtype(dtype)).name in names:
            return parsed
    except TypeError:
        pass
    raise ConfigError(f"dtype is {quote(str(dtype))}; it must be one of {', '.join(names)}")


def _file_position(source: Source, entry: Entry) -> tuple[str, int]:
    info = source.tensors[entry.name]
    return str(info.file), info.offset


class _ParamsBuilder:
    """A parameter tree under construction."""

    def __init__(
        self, config: LlamaConfig, dtype: np.dtype[Any], mesh: Mesh | None, scan_layers: bool
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.mesh = mesh
        self.specs = param_specs(config)
        self.params: dict[str, Any] = {}
        layers: tuple[dict[str, Any], ...] = tuple({} for _ in range(config.num_hidden_layers))
        self.layers = None if scan_layers else layers
        if self.layers is not None:
            self.params["layers"] = self.layers
        self.last: jax.Array | None = None
        self.experts: dict[
            tuple[Any, ...], dict[int, np.ndarray]
        ] = {}  # of matrices that are not complete yet

    def add(self, entry: Entry, array: np.ndarray) -> None:
        """Transfers one tensor to the device and writes it into the tree; all experts of a matrix at once."""
        leaf, layer = entry.leaf, entry.layer
        if leaf.expert is not None:
            found = self.experts.setdefault((leaf.path, layer), {})
            found[leaf.expert] = array.astype(self.dtype, copy=False)
            if len(found) < self.config.num_experts:
                return
            array = np.stack([found[expert] for expert in range(len(found))])
            del self.experts[leaf.path, layer]
        spec = _parent(self.specs, leaf.path)[leaf.path[-1]]
        if layer is None:
            dtype = HEAD_DTYPE if leaf is SCORE else self.dtype
            _parent(self.params, leaf.path)[leaf.path[-1]] = self.transfer(array, spec, dtype)
            return
        value = self.transfer(array, P(*spec[1:]), self.dtype)
        if self.layers is not None:
            _parent(self.layers[layer], leaf.path[1:])[leaf.path[-1]] = value
            return
        parent = _parent(self.params, leaf.path)
        parent[leaf.path[-1]] = _write_layer(self.stack(leaf, spec), value, layer)

    def add_rows(self, entry: Entry, read_rows: ReadRows, format: Format) -> None:
        """Reads this process's rows of one matrix, and writes its shards into the tree."""
        assert self.mesh is not None
        leaf, layer = entry.leaf, entry.layer
        spec = restrict(_parent(self.specs, leaf.path)[leaf.path[-1]], self.mesh.axis_names)
        shards = RowShards(leaf, self.config, self.mesh, spec if layer is None else P(*spec[1:]), format)
        jax.block_until_ready(self.last)
        if layer is not None and self.layers is None:
            self.last = shards.load_into(self.stack(leaf, spec), read_rows, layer)
            _parent(self.params, leaf.path)[leaf.path[-1]] = self.last
            return
        self.last = shards.load(read_rows, HEAD_DTYPE if leaf is SCORE else self.dtype)
        if layer is None:
            _parent(self.params, leaf.path)[leaf.path[-1]] = self.last
        elif self.layers is not None:
            _parent(self.layers[layer], leaf.path[1:])[leaf.path[-1]] = self.last

    def stack(self, leaf: Leaf, spec: P) -> jax.Array:
        """Returns a stacked leaf, zeros at first."""
        parent = _parent(self.params, leaf.path)
        if leaf.path[-1] not in parent:
            shape = leaf.stored_shape(self.config, "orbax")
            parent[leaf.path[-1]] = jnp.zeros(shape, self.dtype, device=self.sharding(spec))
        return parent[leaf.path[-1]]

    def transfer(self, array: np.ndarray, spec: P, dtype: np.dtype[Any]) -> jax.Array:
        # Wait for the previous transfer, so that no queue of tensors builds up in host memory.
        jax.block_until_ready(self.last)
        array = array.astype(dtype, copy=False)
        sharding = self.sharding(spec)
        if sharding is None:
            self.last = jnp.asarray(array)
        else:
            # Each process creates only its addressable shards, so this also works with several hosts.
            self.last = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
        return self.last

    def sharding(self, spec: P) -> NamedSharding | None:
        return None if self.mesh is None else named(self.mesh, spec)


def _parent(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """Returns the dict that contains the leaf at `path`, creating it if needed."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    return tree


@functools.partial(jax.jit, donate_argnums=0)
def _write_layer(stack: jax.Array, value: jax.Array, layer: int) -> jax.Array:
    """Writes one layer into a stacked leaf, in place."""
    return jax.lax.dynamic_update_index_in_dim(stack, value, layer, 0)
