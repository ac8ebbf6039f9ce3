"""Plans an Orbax checkpoint of parameters only: `params/` as in the trainer's checkpoints, and config.json.

Orbax saves trees whose leaves are all in memory. Here it saves a tree of one-element arrays, which creates
the metadata files, and TensorStore then replaces these by arrays of the real shapes, written one layer at a
time.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from llama_jax.config import LlamaConfig
from llama_jax.weights.hf_families import own_family_of
from llama_jax.weights.names import Leaf, leaves
from llama_jax.weights.orbax_tree import array_spec, silence_orbax_log, single_line_errors
from llama_jax.weights.runs import PARAMS
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast
from llama_jax.weights.write.hf import config_fields
from llama_jax.weights.write.plan import Plan, Region
from llama_jax.weights.write.small_files import json_file
from llama_jax.weights.write.staging import sync_path
from llama_jax.weights.write.vocabulary import Vocabulary


def plan_orbax(tensors: Tensors, dtype: np.dtype[Any] | None, vocabulary: Vocabulary) -> Plan:
    """Plans a directory with `params/` and config.json.

    Args:
      tensors: the tensors to write.
      dtype: dtype of all leaves; None keeps each leaf's own, which is that of its first layer.
      vocabulary: the tokenizer, whose files are included.
    """
    config, regions, dtypes = tensors.config, [], {}
    for leaf in leaves(config):
        layers: Sequence[int | None] = range(config.num_hidden_layers) if leaf.per_layer else (None,)
        dtypes[leaf.orbax] = dtype or tensors.dtype(leaf, layers[0])
        encode = functools.partial(_encode, leaf, config, dtypes[leaf.orbax])
        nbytes = int(np.prod(leaf.shape(config), dtype=np.int64)) * dtypes[leaf.orbax].itemsize
        regions += [Region(leaf.orbax, layer or 0, nbytes, leaf, layer, encode) for layer in layers]
    fields = config_fields(config, vocabulary, own_family_of(config))
    fields |= {"torch_dtype": dtypes[regions[0].leaf.orbax].name}
    extras = {**vocabulary.files, "config.json": json_file(fields)}
    store = functools.partial(_open_arrays, config, dtypes)
    return Plan("orbax", False, {}, (), extras, regions, store=store)


def _encode(leaf: Leaf, config: LlamaConfig, dtype: np.dtype[Any], array: np.ndarray) -> np.ndarray:
    return leaf.from_stored(cast(array, dtype), config, "hf")


class _ArrayStore:
    """The leaves' TensorStore arrays, open for writing."""

    def __init__(self, folder: Path, arrays: dict[str, Any]) -> None:
        self.folder, self.arrays = folder, arrays

    def write(self, region: Region, data: np.ndarray) -> None:
        array = self.arrays[region.file]
        place = tuple(axis for axis in (region.layer, region.leaf.expert) if axis is not None)
        try:
            (array[place] if place else array).write(data).result()
        except ValueError as error:  # TensorStore's only error type
            disk_full = "RESOURCE_EXHAUSTED" in str(error) or "No space" in str(error)
            code = errno.ENOSPC if disk_full else errno.EIO
            raise OSError(code, os.strerror(code)) from error

    def sync(self) -> None:
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # a lock file of a concurrent write
                sync_path(path)


@contextlib.contextmanager
def _open_arrays(
    config: LlamaConfig, dtypes: dict[str, np.dtype[Any]], folder: Path
) -> Iterator[_ArrayStore]:
    import orbax.checkpoint as ocp
    import tensorstore

    params = folder / PARAMS
    with single_line_errors(params, "written"):
        if not params.exists():
            placeholders = unflatten_dict(
                {name: np.zeros(1, dtype) for name, dtype in dtypes.items()}, sep="."
            )
            with silence_orbax_log(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                checkpointer.save(params.absolute(), args=ocp.args.PyTreeSave(placeholders))
            for leaf in leaves(config):
                if leaf.expert:  # the first expert's is the leaf of all
                    continue
                _create_array(tensorstore, config, params, leaf, dtypes[leaf.orbax])
        # TensorStore would sync after each write; `sync` does that for all arrays at once.
        context = tensorstore.Context({"file_io_sync": False})
        futures = {
            name: tensorstore.open(array_spec(params, name), open=True, context=context) for name in dtypes
        }
        arrays = {name: future.result() for name, future in futures.items()}
    yield _ArrayStore(params, arrays)


def _create_array(
    tensorstore: Any, config: LlamaConfig, params: Path, leaf: Leaf, dtype: np.dtype[Any]
) -> None:
    """Replaces a placeholder by an array of the leaf's shape, in chunks of one layer or expert."""
    shape = leaf.stored_shape(config, "orbax")
    leading = len(shape) - len(leaf.shape(config))
    metadata = {
        "shape": list(shape),
        "chunks": [1] * leading + list(shape[leading:]),
        "compressor": None,  # weights barely compress, and compression is slower than the disk
    }
    spec = array_spec(params, leaf.orbax) | {"metadata": metadata}
    tensorstore.open(spec, dtype=dtype, create=True, delete_existing=True).result()
