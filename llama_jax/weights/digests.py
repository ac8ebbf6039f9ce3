"""Digests of arrays: the same however an array is sharded, stored or read, so that reading verifies it.

A digest is a sum over all elements, modulo 2^32, of a hash of the element's bits and its position. Each
device sums over its own shards while they are in its memory: a checkpoint is verified without reading a byte
twice, and all processes find the same result. A single changed element always changes it; any other damage
escapes with a probability of 2^-32, as with a CRC-32. It detects damage, not forgery.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax.errors import CheckpointError
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.source import format_list

NAME = "digests.json"  # in the directory of an Orbax tree: the digest of each array, by name
Blocks = Iterable[tuple[tuple[int, ...], np.ndarray]]  # positions of first elements, and values
_SMALL = 1 << 22  # bytes of a tree whose digests are computed on the host: compiling would take longer
_MAX_VALUES = 1 << 20  # of which the digest is computed at a time on the host
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def start(tree: Any) -> dict[str, Any]:
    """Starts to compute the digests of a tree's arrays on their devices; does not wait for them.

    All processes of the arrays' mesh call it together.

    Args:
      tree: arrays of elements of 1, 2 or 4 bytes.

    Returns:
      uint32 [] for each array, by its path, joined with dots; replicated over all devices.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}
    nbytes = sum(leaf.nbytes for leaf in leaves.values())
    if nbytes <= _SMALL and all(leaf.is_fully_addressable for leaf in leaves.values()):
        return {name: _digest_on_host(leaf) for name, leaf in leaves.items()}
    found: dict[str, Any] = {}
    meshes: dict[Mesh, dict[str, jax.Array]] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf.sharding, NamedSharding) and isinstance(leaf.sharding.mesh, Mesh):
            parts = _sharded(leaf.sharding.mesh, leaf.sharding.spec)(leaf)
            meshes.setdefault(leaf.sharding.mesh, {})[name] = parts
        else:
            found[name] = _digest_whole(leaf)
    for mesh, arrays in meshes.items():
        found |= dict(zip(arrays, _sum_parts(mesh)(list(arrays.values())), strict=True))
    return found


def _digest_on_host(array: jax.Array) -> np.uint32:
    shards = (shard for shard in array.addressable_shards if shard.replica_id == 0)
    blocks = ((tuple(part.start or 0 for part in shard.index), np.asarray(shard.data)) for shard in shards)
    return of_blocks(array.shape, blocks)


def text(digest: Any) -> str:
    """Returns a digest, uint32 [], as 8 hexadecimal digits; waits for it."""
    return f"{int(digest):08x}"


def of_blocks(shape: Sequence[int], blocks: Blocks) -> np.uint32:
    """Returns the digest, uint32 [], of an array that is read block by block.

    Args:
      shape: of the whole array.
      blocks: the position of the first element of each block, and the block.
    """
    total = 0
    for position, block in _split(blocks):
        index = np.zeros(1, np.uint32)  # not a scalar, whose overflow NumPy reports
        for size, begin, stride in zip(block.shape, position, _strides(shape), strict=True):
            steps = (np.arange(begin, begin + size, dtype=np.uint64) * stride).astype(np.uint32)
            index = index[..., None] + steps
        bits = np.ascontiguousarray(block).reshape(block.shape).view(_UNSIGNED[block.dtype.itemsize])
        total += int(_hash(bits.astype(np.uint32).reshape(-1), index.reshape(-1)).sum(dtype=np.uint32))
    return np.uint32(total % 2**32)


def _split(blocks: Blocks) -> Blocks:
    """Splits large blocks, as a digest takes several times their memory."""
    for position, block in blocks:
        step = max(1, _MAX_VALUES // max(1, math.prod(block.shape[1:])))
        if block.ndim and len(block) > step:
            for begin in range(0, len(block), step):
                yield (position[0] + begin, *position[1:]), block[begin : begin + step]
        else:
            yield position, block


def write(folder: Path, digests: Mapping[str, Any]) -> None:
    """Writes the digests of a tree into its directory; waits for them."""
    lines = {name: text(digest) for name, digest in digests.items()}
    (folder / NAME).write_text(json.dumps(lines, indent=0, sort_keys=True))


def read(folder: Path) -> dict[str, str] | None:
    """Reads the digests of the tree in a directory; None if it was saved without.

    Raises:
      CheckpointError: if the file is damaged.
    """
    if not (folder / NAME).is_file():
        return None
    digests = read_json(folder / NAME)
    if not all(isinstance(digest, str) for digest in digests.values()):
        raise CheckpointError(f"{folder / NAME}: damaged: not digests by name")
    return digests


def check(folder: Path, found: Mapping[str, Any]) -> None:
    """Compares the digests of arrays with those in their directory; arrays without one are not compared.

    Raises:
      CheckpointError: naming the arrays that differ.
    """
    saved = read(folder) or {}
    changed = [name for name, digest in found.items() if name in saved and text(digest) != saved[name]]
    if changed:
        raise CheckpointError(f"{folder}: damaged: {format_list(changed, 4)} is not what was saved")


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) % 2**32 for axis in range(len(shape))]


def _hash(bits: Any, index: Any) -> Any:
    """A hash of each element: uint32 arrays of its bits and of its position modulo 2^32.

    The mixing is `lowbias32` (C. Wellons, Hash Function Prospector), a bijection of the bits at any position.
    """
    x = bits ^ (index * np.uint32(0x9E3779B9))
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _digest(array: jax.Array, shape: tuple[int, ...], begins: Iterable[Any]) -> jax.Array:
    """The digest of a block of an array of this shape whose first element is at `begins`."""
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis, (begin, stride) in enumerate(zip(begins, _strides(shape), strict=True)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) + jnp.asarray(begin, jnp.uint32)
        index = index + steps * np.uint32(stride)
    unsigned = _UNSIGNED[array.dtype.itemsize]
    integers = array.astype(np.uint8) if array.dtype == bool else array
    bits = jax.lax.bitcast_convert_type(integers, unsigned).astype(jnp.uint32)
    return _hash(bits, index).sum(dtype=jnp.uint32)


@jax.jit
def _digest_whole(array: jax.Array) -> jax.Array:
    return _digest(array, array.shape, (0,) * array.ndim)


@functools.lru_cache(maxsize=64)
def _sharded(mesh: Mesh, spec: P) -> Any:
    """A function of an array of this partition spec that returns a part of its digest on each device."""
    axes = tuple(mesh.axis_names)

    @jax.jit
    def digest(array: jax.Array) -> jax.Array:
        entries = [*spec, *[None] * (array.ndim - len(spec))]
        names = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in entries]
        unused = [axis for axis in axes if axis not in {name for entry in names for name in entry}]

        def local(shard: jax.Array) -> jax.Array:
            begins = [
                jax.lax.axis_index(entry) * size if entry else 0
                for entry, size in zip(names, shard.shape, strict=True)
            ]
            first = jnp.array([jax.lax.axis_index(axis) for axis in unused] or [0]).sum() == 0
            return jnp.where(first, _digest(shard, array.shape, begins), 0)[None]  # one of all replicas

        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=P(axes), check_vma=False)(array)

    return digest


@functools.lru_cache(maxsize=16)
def _sum_parts(mesh: Mesh) -> Any:
    """A function that sums the parts of several digests, in one collective."""
    axes = tuple(mesh.axis_names)

    def local(parts: list[jax.Array]) -> list[jax.Array]:
        return list(jax.lax.psum(jnp.concatenate(parts), axes))

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=P(), check_vma=False))
