"""Reads Orbax checkpoints, straight into shards: of a training run, one of its steps, or parameters alone.

Orbax is imported when one is opened, and not before: it takes a third of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import urllib.parse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.sharding import named, param_specs
from llama_jax.weights import manifest
from llama_jax.weights.hf import read_model
from llama_jax.weights.names import HEAD_DTYPE, SCORE, Leaf, leaves
from llama_jax.weights.runs import CHECKPOINTS, PARAMS, RECORD, RUN, read_record, step_folders
from llama_jax.weights.safetensors import read_json
from llama_jax.weights.source import FLOAT_DTYPES, Source, TensorInfo, decode_floats, quote

_METADATA = "_METADATA"  # the file that every Orbax tree has
_CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
_DTYPE_NAMES = {dtype.name: name for name, dtype in FLOAT_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class OrbaxSource(Source):
    """An Orbax checkpoint: its arrays are the leaves of `params` already, so all are read at once.

    Attributes:
      folder: the Orbax tree of parameters that `tensors` describes.
      older: the same of the run's steps before, newest first, to fall back on; none where a step was asked
        for by name.
    """

    folder: Path = Path()
    older: tuple[Path, ...] = ()
    _kept: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    _lock: Any = dataclasses.field(default_factory=threading.RLock, repr=False, compare=False)

    def read(self, name: str) -> np.ndarray:
        """Reads one leaf, stacked over layers.

        Raises:
          CheckpointError: if there is no such leaf, or it cannot be read.
        """
        folder = self._verified()
        whole = describe_tree(folder)
        if name not in whole:
            raise CheckpointError(f"{folder}: there is no tensor {name!r}")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        leaf = jax.ShapeDtypeStruct(whole[name].shape, whole[name].dtype, sharding=device)
        return np.asarray(jax.tree.leaves(read_tree(folder, nest({name: leaf})))[0])

    def read_layer(self, name: str, layer: int | None) -> np.ndarray:
        """Reads one layer of a leaf, or the whole of one that is not stacked.

        Where the file holds several layers in one piece, the leaf is read whole and kept until another one
        is asked for: so ask for all layers of a leaf before the next.

        Raises:
          CheckpointError: if there is no such leaf, or it cannot be read.
        """
        if layer is None:
            return self.read(name)
        folder = self._verified()
        with self._lock:
            if self._kept.get("name") == name:
                return self._kept["stack"][layer]
            array = self._array(folder, name)
            if array.chunk_layout.read_chunk.shape[0] != 1:
                self._kept.update(name=name, stack=self.read(name))
                return self._kept["stack"][layer]
        with one_line(folder):
            return np.asarray(array[layer].read().result())

    def _array(self, folder: Path, name: str) -> Any:
        """A leaf as TensorStore has it, open for reading."""
        import tensorstore

        if name not in self.tensors:
            raise CheckpointError(f"{folder}: there is no tensor {quote(name)}")
        with one_line(folder):
            return tensorstore.open(array_spec(folder, name), open=True).result()

    def _verified(self) -> Path:
        """The tree to read one leaf after another from, whose checksums are compared the first time."""
        with self._lock:
            if "folder" not in self._kept:
                self._kept["folder"] = self._first_whole()
            return self._kept["folder"]

    def restore(
        self,
        dtype: Any,
        mesh: Mesh | None,
        *,
        scan_layers: bool = True,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> dict[str, Any]:
        """Reads the parameters, each device its own part of them, after comparing their checksums.

        Args: as `load_params` has them.

        Raises:
          CheckpointError: if the files are damaged, and no step before can stand in, or cannot be read.
        """
        folder = self._first_whole()
        total = sum(info.nbytes for info in self.tensors.values())
        report = progress or (lambda *_: None)
        report(0, total, str(folder))
        params = read_tree(folder, abstract_params(self.config, dtype, mesh))
        report(total, total, str(folder))
        return params if scan_layers else _unstack(params, self.config, mesh)

    def _first_whole(self) -> Path:
        """Returns the newest tree whose checksums hold, with a warning if it is not the first."""
        problems: list[str] = []
        for folder in (self.folder, *self.older):
            try:
                if "step" in self.metadata or (folder / manifest.NAME).exists():
                    manifest.verify(folder)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            if problems:
                warnings.warn(f"{'; '.join(problems)}; {folder.parent} is read instead", stacklevel=4)
            return folder
        raise CheckpointError(f"{'; '.join(problems)}; restore the file from a copy")


def array_spec(folder: Path, name: str) -> dict[str, Any]:
    """Where Orbax keeps a leaf, for TensorStore: a zarr array in the folder's OCDBT database."""
    base = f"file://{urllib.parse.quote(str(folder.absolute()))}/"
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}


def is_orbax(path: Path) -> bool:
    """Whether a directory is an Orbax tree of parameters, or holds one beside other items."""
    return (path / _METADATA).is_file() or (path / PARAMS / _METADATA).is_file()


def open_run(path: Path) -> OrbaxSource:
    """Opens the newest step of a training run's directory whose files are all there.

    Raises:
      CheckpointError: if there is none, saying what is wrong with each.
    """
    folders = list(reversed(step_folders(path).values()))
    if not folders:
        raise CheckpointError(
            f"{path}: a training run without a checkpoint yet; train it first: llama-jax train"
        )
    problems: list[str] = []
    for index, folder in enumerate(folders):
        try:
            why = f"a training run; its newest {'whole ' if problems else ''}step is {folder.name}"
            source = open_orbax(folder, "; ".join([why, *problems]))
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}; {folder} is read instead", stacklevel=2)
        older = tuple(folder / PARAMS for folder in folders[index + 1 :])
        return dataclasses.replace(source, path=path, older=older)
    raise CheckpointError(f"{path}: no checkpoint of this run is whole: {'; '.join(problems)}")


def open_orbax(path: Path, why: str) -> OrbaxSource:
    """Opens one step of a training run, or parameters alone with a config.json in or beside their folder.

    Raises:
      CheckpointError: if a file is missing or damaged, or nothing says which model it is.
    """
    folder = path / PARAMS if (path / PARAMS / _METADATA).is_file() else path
    home = path
    if (record_path := path / RUN / RECORD).parent.is_dir():
        manifest.verify(path, quick=True)
        record = read_record(path)
        config = record.config
        metadata = {"step": record.step, "metrics": record.metrics, "run": record.run}
        home = path.parent.parent if path.parent.name == CHECKPOINTS else path
    else:
        found = [place for place in (path, path.parent) if (place / "config.json").is_file()]
        if not found:
            raise CheckpointError(
                f"{path}: Orbax parameters without a model's description: neither {record_path} nor "
                f"{path / 'config.json'} is there; put the model's config.json there"
            )
        (config, metadata), home = read_model(found[0] / "config.json"), found[0]
    tensors = {name: _info(folder, name, leaf) for name, leaf in describe_tree(folder).items()}
    return OrbaxSource("orbax", path, why, config, tensors, decode_floats, metadata, home, folder)


def _info(folder: Path, name: str, leaf: jax.ShapeDtypeStruct) -> TensorInfo:
    dtype = _DTYPE_NAMES.get(leaf.dtype.name)
    if dtype is None:
        raise CheckpointError(f"{folder}: tensor {name!r} is {leaf.dtype.name}, not a floating-point type")
    return TensorInfo(leaf.shape, dtype, math.prod(leaf.shape) * leaf.dtype.itemsize, folder, 0)


def abstract_params(config: LlamaConfig, dtype: Any, mesh: Mesh | None) -> dict[str, Any]:
    """Returns the stacked parameter tree of `config` with shapes, dtype and shardings in place of arrays."""
    specs = param_specs(config)

    def leaf_of(leaf: Leaf) -> jax.ShapeDtypeStruct:
        if mesh is None:
            sharding: Any = jnp.zeros(()).sharding
        else:
            spec: Any = specs
            for key in leaf.path:
                spec = spec[key]
            sharding = named(mesh, spec)
        shape, own = leaf.stored_shape(config, "orbax"), HEAD_DTYPE if leaf is SCORE else dtype
        return jax.ShapeDtypeStruct(shape, own, sharding=sharding)

    return nest({leaf.orbax: leaf_of(leaf) for leaf in leaves(config)})


def describe_tree(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of an Orbax tree's arrays by name, a leaf's keys joined with dots.

    Raises:
      CheckpointError: if the folder holds no Orbax tree, or a damaged one.
    """
    for name in (_METADATA, _CHECKPOINT_METADATA):
        if (folder / name).exists():
            read_json(folder / name)  # Orbax's own parser does not come back whole from hostile ones
    with _reading(folder) as (_, reader):
        metadata = reader.metadata(folder.absolute())  # Orbax takes no relative path
        found, _ = jax.tree_util.tree_flatten_with_path(metadata.item_metadata.tree)
        return {
            jax.tree_util.keystr(path, simple=True, separator="."): jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype
            )
            for path, leaf in found
        }


def read_tree(folder: Path, abstract: Any) -> Any:
    """Reads an Orbax tree, or a part of it.

    Args:
      folder: the tree's.
      abstract: a tree of `jax.ShapeDtypeStruct`, each with the sharding to read into. Orbax casts to another
        dtype; the shapes must be the stored ones.

    Raises:
      CheckpointError: if it cannot be read.
    """
    with _reading(folder) as (ocp, reader):
        args = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        return jax.block_until_ready(reader.restore(folder.absolute(), args=args))


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[tuple[Any, Any]]:
    """Gives the Orbax module and a reader of trees, and turns whatever they raise into one line."""
    import orbax.checkpoint as ocp

    with one_line(folder), quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        yield ocp, reader


@contextlib.contextmanager
def one_line(folder: Path, done: str = "read") -> Iterator[None]:
    """Turns whatever TensorStore and Orbax raise, where a folder cannot be read or written, into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # TensorStore's and Orbax's have no common base
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(f"{folder}: cannot be {done}: {what}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax's log, tracebacks among it, from stderr: what goes wrong is raised as well."""
    logger = logging.getLogger("absl")

    def other(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def nest(leaves_by_name: dict[str, Any]) -> dict[str, Any]:
    """The tree whose leaves have these names, keys joined with dots."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves_by_name.items():
        *parents, last = name.split(".")
        place = tree
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree


def _unstack(params: dict[str, Any], config: LlamaConfig, mesh: Mesh | None) -> dict[str, Any]:
    """Splits each stacked leaf into its layers, letting go of it before the next."""
    layers: tuple[dict[str, Any], ...] = tuple({} for _ in range(config.num_hidden_layers))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        for part, stack in params.pop("layers").items():
            for name in list(stack):
                leaf = stack.pop(name)
                for index, layer in enumerate(layers):
                    layer.setdefault(part, {})[name] = leaf[index]
                jax.block_until_ready(layers)
    return {**params, "layers": layers}
