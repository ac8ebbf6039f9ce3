"""Plans an Orbax checkpoint of parameters alone: `params/` as the trainer has it, and config.json.

Orbax saves a tree whose leaves are all in memory. Here it saves one of single numbers, which gives the
files that describe the tree, and TensorStore then fills in arrays of the real shapes, a layer at a time.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.weights.names import Leaf, leaves
from llama_jax.weights.orbax import array_spec, nest, one_line, quiet
from llama_jax.weights.runs import PARAMS
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast
from llama_jax.weights.write.hf import config_fields
from llama_jax.weights.write.plan import Plan, Region
from llama_jax.weights.write.staging import sync_path
from llama_jax.weights.write.vocabulary import Vocabulary


def plan_orbax(tensors: Tensors, dtype: np.dtype[Any] | None, vocabulary: Vocabulary) -> Plan:
    """Plans a directory with `params/` and config.json.

    Args:
      tensors: what to write.
      dtype: of every leaf; None keeps each leaf's own, that of its first layer.
      vocabulary: its files are put beside.
    """
    config, regions, dtypes = tensors.config, [], {}
    for leaf in leaves(config):
        layers: Sequence[int | None] = range(config.num_hidden_layers) if leaf.per_layer else (None,)
        dtypes[leaf.orbax] = dtype or tensors.dtype(leaf, layers[0])
        encode = functools.partial(_encode, leaf, config, dtypes[leaf.orbax])
        nbytes = int(np.prod(leaf.shape(config), dtype=np.int64)) * dtypes[leaf.orbax].itemsize
        regions += [Region(leaf.orbax, layer or 0, nbytes, leaf, layer, encode) for layer in layers]
    main = dtypes[regions[0].leaf.orbax].name
    fields = json.dumps(config_fields(config, vocabulary) | {"torch_dtype": main}, indent=2) + "\n"
    extras = {**vocabulary.files, "config.json": fields.encode()}
    store = functools.partial(_open, config, dtypes)
    return Plan("orbax", False, {}, (), extras, regions, store=store)


def _encode(leaf: Leaf, config: LlamaConfig, dtype: np.dtype[Any], array: np.ndarray) -> np.ndarray:
    return leaf.from_stored(cast(array, dtype), config, "hf")


class _Arrays:
    """The leaves, open for writing."""

    def __init__(self, folder: Path, arrays: dict[str, Any]) -> None:
        self.folder, self.arrays = folder, arrays

    def write(self, region: Region, data: np.ndarray) -> None:
        array = self.arrays[region.file]
        try:
            (array if region.layer is None else array[region.layer]).write(data).result()
        except ValueError as error:  # as TensorStore says everything
            full = "RESOURCE_EXHAUSTED" in str(error) or "No space" in str(error)
            code = errno.ENOSPC if full else errno.EIO
            raise OSError(code, os.strerror(code)) from error

    def sync(self) -> None:
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a lock of a write that goes on meanwhile
                sync_path(path)


@contextlib.contextmanager
def _open(config: LlamaConfig, dtypes: dict[str, np.dtype[Any]], folder: Path) -> Iterator[_Arrays]:
    import orbax.checkpoint as ocp
    import tensorstore

    params = folder / PARAMS
    with one_line(params, "written"):
        if not params.exists():
            tiny = nest({name: np.zeros(1, dtype) for name, dtype in dtypes.items()})
            with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(params.absolute(), args=ocp.args.PyTreeSave(tiny))
            for leaf in leaves(config):
                _create(tensorstore, config, params, leaf, dtypes[leaf.orbax])
        # `sync` does for all arrays at once what TensorStore would do after each write.
        context = tensorstore.Context({"file_io_sync": False})
        opened = {
            name: tensorstore.open(array_spec(params, name), open=True, context=context) for name in dtypes
        }
        arrays = {name: array.result() for name, array in opened.items()}
    yield _Arrays(params, arrays)


def _create(tensorstore: Any, config: LlamaConfig, params: Path, leaf: Leaf, dtype: np.dtype[Any]) -> None:
    """Puts an array of the leaf's shape in the place of the single number, in pieces of one layer."""
    shape = leaf.stored_shape(config, "orbax")
    metadata = {
        "shape": list(shape),
        "chunks": [1 if leaf.per_layer else shape[0], *shape[1:]],
        "compressor": None,  # weights hardly shrink, and it takes longer than the disk
    }
    spec = array_spec(params, leaf.orbax) | {"metadata": metadata}
    tensorstore.open(spec, dtype=dtype, create=True, delete_existing=True).result()
