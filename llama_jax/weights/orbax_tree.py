"""Reads the arrays of an Orbax tree: each device its shards, or chunk by chunk on the host.

Orbax is imported lazily, when a checkpoint is opened: the import takes a third of a second.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from llama_jax.errors import CheckpointError, StoreError
from llama_jax.storage.tensorstore_spec import kvstore, raise_for_tensorstore
from llama_jax.weights import digests
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.orbax_paths import orbax_path
from llama_jax.weights.processes import raised_by_all

METADATA = "_METADATA"  # every Orbax tree has this file
_CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"


def array_spec(folder: Path, name: str) -> dict[str, Any]:
    """Returns the TensorStore spec of a leaf: a zarr array in the directory's OCDBT database."""
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": kvstore(folder), "path": f"{name}/"}}


def tree_metadata(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of an Orbax tree's arrays by path, keys joined with dots.

    Raises:
      CheckpointError: if the directory has no Orbax tree, or a damaged one.
    """
    for name in (METADATA, _CHECKPOINT_METADATA):
        if (folder / name).exists():
            read_json(folder / name)  # hostile files crash Orbax's own parser
    with _open_handler(folder) as (_, handler):
        flat, _ = jax.tree_util.tree_flatten_with_path(handler.metadata(orbax_path(folder)).tree)
        return {_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in flat}


def read_tree(folder: Path, abstract: Any) -> Any:
    """Restores an Orbax tree, or a part of it.

    Args:
      folder: the directory of the tree.
      abstract: nested dicts of `jax.ShapeDtypeStruct` with the target dtypes and shardings. Orbax casts to
        the dtype; the shapes must equal the stored ones.

    Raises:
      CheckpointError: if the tree cannot be read.
    """
    with _open_handler(folder) as (ocp, handler):
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return jax.block_until_ready(handler.restore(orbax_path(folder), args=args))


def read_verified(folder: Path, abstract: Any) -> Any:
    """Reads as `read_tree`, and compares the digests of the arrays where the tree has them.

    Where the arrays are sharded over several processes all call it, and all raise the same error. Arrays of
    another dtype than the stored one are read one by one and cast on the devices: the digest is of what is
    stored.

    Raises:
      CheckpointError: if a process cannot read its part, or an array is not what was saved.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    targets = {_name(path): leaf for path, leaf in leaves}
    keys = {_name(path): tuple(entry.key for entry in path) for path, _ in leaves}
    shared = any(not leaf.sharding.is_fully_addressable for leaf in targets.values())
    stored: dict[str, jax.ShapeDtypeStruct] = {}
    with raised_by_all(shared):
        if digests.read(folder) is not None:
            stored = tree_metadata(folder)
    cast = {name for name, leaf in targets.items() if name in stored and stored[name].dtype != leaf.dtype}
    groups = [[name for name in targets if name not in cast]]
    groups += [[name] for name in sorted(cast, key=lambda name: -math.prod(targets[name].shape))]
    found: dict[str, jax.Array] = {}
    for names in filter(None, groups):
        part = {
            keys[name]: targets[name].update(dtype=stored[name].dtype) if name in cast else targets[name]
            for name in names
        }
        with raised_by_all(shared):
            read, _ = jax.tree_util.tree_flatten_with_path(read_tree(folder, unflatten_dict(part)))
        arrays = {_name(path): array for path, array in read}
        if stored:
            digests.check(folder, digests.start(arrays))
        found |= {name: array.astype(targets[name].dtype) for name, array in arrays.items()}
    return jax.tree_util.tree_unflatten(structure, [found[name] for name in targets])


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def verify_arrays(folder: Path) -> None:
    """Compares the digests of a tree's arrays, which it reads chunk by chunk; without digests it reads none.

    Raises:
      CheckpointError: naming the array that differs or cannot be read.
    """
    import tensorstore

    def digest(name: str) -> np.uint32:
        with single_line_errors(folder):
            array = tensorstore.open(array_spec(folder, name), open=True).result()
        shape: tuple[int, ...] = tuple(array.shape)
        chunk: Any = array.chunk_layout.read_chunk.shape or shape  # a scalar has no chunks
        starts = itertools.product(*(range(0, size, step) for size, step in zip(shape, chunk, strict=True)))

        def blocks() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
            for start in starts:
                index = tuple(
                    slice(begin, min(begin + step, size))
                    for begin, step, size in zip(start, chunk, shape, strict=True)
                )
                with single_line_errors(folder):
                    yield start, np.asarray(array[index].read().result())

        return digests.of_blocks(shape, blocks())

    names = list(digests.read(folder) or ())
    with ThreadPoolExecutor(4) as pool:
        digests.check(folder, dict(zip(names, pool.map(digest, names), strict=True)))


@contextlib.contextmanager
def _open_handler(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Yields the Orbax module and a handler of trees; its errors become one-line `CheckpointError`s.

    Not a Checkpointer, which waits for the other processes, of which each may find another problem.
    """
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler()
    with single_line_errors(folder), silence_orbax_log(), contextlib.closing(handler):
        yield ocp, handler


@contextlib.contextmanager
def single_line_errors(folder: Path, operation: str = "read") -> Iterator[None]:
    """Converts exceptions of TensorStore and Orbax to one-line `CheckpointError`s."""
    try:
        yield
    except (CheckpointError, StoreError):
        raise
    except Exception as error:  # TensorStore's and Orbax's exceptions have no common base class
        _silence_abandoned_coroutines()
        raise_for_tensorstore(folder, operation, error)
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder}: cannot be {operation}: {detail}") from error


def _silence_abandoned_coroutines() -> None:
    """Suppresses the traceback that Python prints for each other read that Orbax gives up after an error.

    It does so when they are collected, as late as at exit: there is no end to this.
    """
    hook = sys.unraisablehook

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        if not inspect.iscoroutine(args.object):
            hook(args)

    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


@contextlib.contextmanager
def silence_orbax_log() -> Iterator[None]:
    """Suppresses Orbax's log messages, including tracebacks: errors are raised as well."""
    logger = logging.getLogger("absl")

    def is_not_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger.addFilter(is_not_orbax)
    try:
        yield
    finally:
        logger.removeFilter(is_not_orbax)
