"""Loads stored matrices onto a mesh of several processes, each of which reads an equal share of the rows.

A shard of a parameter is a block of columns of the stored [out, in] matrix if it is sharded over inputs, and
reading that from a file touches every row. So each device gets rows that are contiguous in the file, of the
rows of its own shard where outputs are sharded, and the devices exchange columns (all-to-all) and, where the
parameter is replicated, rows (all-gather). Every byte of the file is read by one process, once, and no host
or device holds more of a matrix than its rows and its shard.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.config import LlamaConfig
from llama_jax.weights.names import Format, Leaf, is_interleaved, split_rotary_pairs

ReadRows = Callable[[int, int], np.ndarray]  # rows begin to end (exclusive) of a stored matrix


@dataclasses.dataclass(frozen=True)
class RowShards:
    """How the rows of a leaf's stored matrices [out, in] are divided over the devices of a mesh.

    Attributes:
      leaf: the leaf, of at least two dimensions.
      config: the model's configuration.
      mesh: the mesh.
      spec: the leaf's partition spec, without the layer axis.
      format: the format of the stored matrices, one that is not stacked.
    """

    leaf: Leaf
    config: LlamaConfig
    mesh: Mesh
    spec: P
    format: Format

    def load(self, read_rows: ReadRows, dtype: Any) -> jax.Array:
        """Reads one matrix; returns the leaf of one layer."""
        return self._program(None)(self._rows(read_rows, dtype))

    def load_into(self, stack: jax.Array, read_rows: ReadRows, layer: int) -> jax.Array:
        """Reads one matrix into a layer of a stacked leaf, which is donated; returns the stack."""
        return self._program(stack.ndim)(self._rows(read_rows, stack.dtype), stack, np.int32(layer))

    @functools.cached_property
    def _axes(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """The mesh axes that shard outputs (rows), none, and inputs (columns)."""
        inputs, arrow, _ = self.leaf.axes.partition("->")
        split = len(inputs) if arrow else 1
        first, second = (_flat(part) for part in (self.spec[:split], self.spec[split:]))
        rows, columns = (second, first) if arrow else (first, second)
        used = {*rows, *columns}
        rest = (axis for axis, size in self.mesh.shape.items() if size > 1 and axis not in used)
        return rows, tuple(rest), columns

    def _size(self, axes: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _rows(self, read_rows: ReadRows, dtype: Any) -> jax.Array:
        """The matrix with its rows divided over all devices, padded to equal blocks."""
        outputs, rest, inputs = self._axes
        height, width = self.leaf.stored_shape(self.config, self.format)
        shard, parts = height // self._size(outputs), self._size(rest) * self._size(inputs)
        block = -(-shard // parts)

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            number, start = divmod(index[0].start or 0, parts * block)
            begin, end = min(start, shard), min(start + block, shard)
            if end - begin == block:
                rows = read_rows(number * shard + begin, number * shard + end)
                return rows.astype(dtype, copy=False)
            padded = np.zeros((block, width), dtype)
            if begin < end:
                padded[: end - begin] = read_rows(number * shard + begin, number * shard + end)
            return padded

        shape = (self._size(outputs) * parts * block, width)
        sharding = NamedSharding(self.mesh, P((*outputs, *rest, *inputs)))
        return jax.make_array_from_callback(shape, sharding, read)

    def _program(self, stacked: int | None) -> Any:
        return _compile(self.leaf, self.config, self.mesh, self.spec, self.format, stacked)


@functools.lru_cache(maxsize=64)
def _compile(
    leaf: Leaf, config: LlamaConfig, mesh: Mesh, spec: P, format: Format, stacked: int | None
) -> Any:
    """Compiles the exchange: rows -> leaf, or rows, stack, layer -> stack."""
    shards = RowShards(leaf, config, mesh, spec, format)
    outputs, rest, inputs = shards._axes
    sharding = NamedSharding(mesh, spec)
    shape = sharding.shard_shape(leaf.shape(config))
    height = leaf.stored_shape(config, format)[0] // shards._size(outputs)
    interleaved = leaf.rotary and is_interleaved(format, config)

    def exchange(rows: jax.Array) -> Any:
        if inputs:
            rows = jax.lax.all_to_all(rows, inputs, 1, 0, tiled=True)
        if rest:
            rows = jax.lax.all_gather(rows, rest, axis=0, tiled=True)
        rows = rows[:height]
        local: Any = (rows.T if "->" in leaf.axes else rows).reshape(shape)
        return split_rotary_pairs(local) if interleaved else local

    def write(rows: jax.Array, stack: jax.Array, layer: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(stack, exchange(rows), layer, 0)

    row_spec = P((*outputs, *rest, *inputs))
    # check_vma: JAX does not infer that gathered rows are the same on every device.
    if stacked is None:
        return jax.jit(jax.shard_map(exchange, mesh=mesh, in_specs=row_spec, out_specs=spec, check_vma=False))
    stack_spec = P(None, *spec)
    mapped = jax.shard_map(
        write, mesh=mesh, in_specs=(row_spec, stack_spec, P()), out_specs=stack_spec, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=1)


def _flat(spec: tuple[Any, ...]) -> tuple[str, ...]:
    """The mesh axes of a part of a partition spec."""
    return tuple(
        axis
        for entry in spec
        if entry is not None
        for axis in ((entry,) if isinstance(entry, str) else entry)
    )
