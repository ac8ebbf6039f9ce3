"""Reads Orbax checkpoints directly into shards: a training run, one of its steps, or only parameters.

Orbax is imported lazily, when a checkpoint is opened: the import takes a third of a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.sharding import named, param_specs
from llama_jax.weights import manifest
from llama_jax.weights.hf import read_config_and_metadata
from llama_jax.weights.names import HEAD_DTYPE, SCORE, Leaf, leaves
from llama_jax.weights.orbax_tree import (
    METADATA,
    array_spec,
    read_tree,
    read_verified,
    single_line_errors,
    tree_metadata,
    verify_arrays,
)
from llama_jax.weights.processes import raised_by_all
from llama_jax.weights.runs import (
    CHECKPOINTS,
    PARAMS,
    RUN,
    STEP_METADATA_FILE,
    read_step_metadata,
    step_folders,
)
from llama_jax.weights.source import DTYPE_NAMES, Progress, Source, TensorInfo, decode_floats, quote

_T = TypeVar("_T")
_TRIES = 10  # to read a run's newest step while it saves others and deletes it


@dataclasses.dataclass(frozen=True)
class OrbaxSource(Source):
    """An Orbax checkpoint: its arrays are the leaves of `params`, so that one restore reads all of them.

    Attributes:
      folder: the Orbax tree of parameters that `tensors` describes.
      fallbacks: the parameter trees of the run's earlier steps, newest first, used if `folder` is damaged;
        empty if one step was opened.
    """

    folder: Path = Path()
    fallbacks: tuple[Path, ...] = ()
    _cache: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)
    _lock: Any = dataclasses.field(default_factory=threading.RLock, repr=False, compare=False)

    def read(self, name: str) -> np.ndarray:
        """Reads one leaf, stacked over layers.

        Raises:
          CheckpointError: if there is no such leaf, or it cannot be read.
        """
        folder = self._verified_folder()
        metadata = tree_metadata(folder)
        if name not in metadata:
            raise CheckpointError(f"{folder}: there is no tensor {name!r}")
        device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        leaf = jax.ShapeDtypeStruct(metadata[name].shape, metadata[name].dtype, sharding=device)
        abstract = unflatten_dict({name: leaf}, sep=".")
        return np.asarray(jax.tree.leaves(read_tree(folder, abstract))[0])

    def read_layer(self, name: str, layer: int | None, expert: int | None = None) -> np.ndarray:
        """Reads one layer of a stacked leaf, or one expert of it; an unstacked leaf if `layer` is None.

        If a chunk of the array has several layers, the whole leaf is read and cached until another leaf is
        read: read all layers of a leaf before the next leaf.

        Raises:
          CheckpointError: if there is no such leaf, or it cannot be read.
        """
        if layer is None:
            return self.read(name)
        folder = self._verified_folder()
        index = layer if expert is None else (layer, expert)
        with self._lock:
            if self._cache.get("name") == name:
                return self._cache["stack"][index]
            array = self._open_array(folder, name)
            if array.chunk_layout.read_chunk.shape[0] != 1:
                self._cache.update(name=name, stack=self.read(name))
                return self._cache["stack"][index]
        with single_line_errors(folder):
            return np.asarray(array[index].read().result())

    def _open_array(self, folder: Path, name: str) -> Any:
        """Opens a leaf's TensorStore array."""
        import tensorstore

        if name not in self.tensors:
            raise CheckpointError(f"{folder}: there is no tensor {quote(name)}")
        with single_line_errors(folder):
            return tensorstore.open(array_spec(folder, name), open=True).result()

    def _verified_folder(self) -> Path:
        """Returns the tree to read single leaves from; verifies checksums on the first call."""
        with self._lock:
            if "folder" not in self._cache:
                self._cache["folder"] = self._from_newest_intact(_verified)
            return self._cache["folder"]

    def restore(
        self,
        dtype: Any,
        mesh: Mesh | None,
        *,
        scan_layers: bool = True,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Verifies the checksums and restores the parameters, each device only its shards.

        Args: as `load_params`.

        Raises:
          CheckpointError: if the files are damaged and no earlier step is intact, or cannot be read.
        """
        total = sum(info.nbytes for info in self.tensors.values())
        report = progress or (lambda *_: None)
        abstract = abstract_params(self.config, dtype, mesh)

        def read(folder: Path) -> dict[str, Any]:
            report(0, total, str(folder))
            params = read_verified(folder, abstract)
            report(total, total, str(folder))
            return params

        params = self._from_newest_intact(read, shared=mesh is not None and mesh.is_multi_process)
        return params if scan_layers else _unstack(params, self.config, mesh)

    def _from_newest_intact(self, read: Callable[[Path], _T], *, shared: bool = False) -> _T:
        """Reads the newest tree that is intact, with a warning if newer ones are damaged.

        Those of a run are listed again if it has saved and deleted steps meanwhile.

        Args:
          read: reads the tree in a directory; an error is one of the tree.
          shared: whether all processes do so together; then each hashes its share of the files.
        """
        folders: tuple[Path, ...] = (self.folder, *self.fallbacks)
        share = (jax.process_index(), jax.process_count()) if shared else (0, 1)
        for _ in range(_TRIES):
            problems: list[str] = []
            for folder in folders:
                try:
                    with raised_by_all(shared):
                        if "step" in self.metadata or (folder / manifest.NAME).exists():
                            manifest.verify(folder, shard=share)
                    found = read(folder)
                except CheckpointError as error:
                    problems += [str(error)] if folder.exists() else []
                    continue
                if problems:
                    warnings.warn(f"{'; '.join(problems)}; using {folder.parent} instead", stacklevel=4)
                return found
            if self.path in (self.folder, self.folder.parent):  # one step
                break
            listed = tuple(step / PARAMS for step in reversed(step_folders(self.path).values()))
            if listed == folders:
                break
            folders = listed
        problem = "; ".join(problems) or f"{self.folder}: was deleted meanwhile"
        raise CheckpointError(f"{problem}; restore the file from a copy")


def _verified(folder: Path) -> Path:
    verify_arrays(folder)
    return folder


def is_orbax(path: Path) -> bool:
    """Whether a directory is an Orbax tree of parameters, or a checkpoint that contains one."""
    return (path / METADATA).is_file() or (path / PARAMS / METADATA).is_file()


def open_run(path: Path) -> OrbaxSource:
    """Opens the newest step of a training run that has all its files.

    The run may be saving and deleting steps: if all steps found are gone, they are listed again.

    Raises:
      CheckpointError: if there is none, with the problem of each step.
    """
    folders: list[Path] = []
    problems: list[str] = []
    for _ in range(_TRIES):
        listed = list(reversed(step_folders(path).values()))
        if not listed:
            raise CheckpointError(
                f"{path}: a training run without a checkpoint yet; train it first: llama-jax train"
            )
        if listed == folders:
            break
        folders, problems = listed, []
        if (source := _open_first(path, folders, problems)) is not None:
            return source
    raise CheckpointError(f"{path}: no checkpoint of this run is intact: {'; '.join(problems)}")


def _open_first(path: Path, folders: list[Path], problems: list[str]) -> OrbaxSource | None:
    """Opens the first of a run's steps that can be; adds the problem of each one before it to `problems`."""
    for index, folder in enumerate(folders):
        try:
            detected_by = f"a training run; its newest {'intact ' if problems else ''}step is {folder.name}"
            source = open_orbax(folder, "; ".join([detected_by, *problems]))
        except CheckpointError as error:
            problems += [str(error)] if folder.exists() else []
            continue
        if problems:
            warnings.warn(f"{'; '.join(problems)}; using {folder} instead", stacklevel=3)
        fallbacks = tuple(folder / PARAMS for folder in folders[index + 1 :])
        return dataclasses.replace(source, path=path, fallbacks=fallbacks)
    return None


def open_orbax(path: Path, detected_by: str) -> OrbaxSource:
    """Opens one step of a training run, or only parameters, with a config.json in or beside their directory.

    Raises:
      CheckpointError: if a file is missing or damaged, or there is no model configuration.
    """
    folder = path / PARAMS if (path / PARAMS / METADATA).is_file() else path
    tokenizer_dir = path
    if (metadata_path := path / RUN / STEP_METADATA_FILE).parent.is_dir():
        manifest.verify(path, quick=True)
        step = read_step_metadata(path)
        config = step.config
        metadata = {"step": step.step, "metrics": step.metrics, "run": step.run}
        tokenizer_dir = path.parent.parent if path.parent.name == CHECKPOINTS else path
    else:
        folders = [parent for parent in (path, path.parent) if (parent / "config.json").is_file()]
        if not folders:
            raise CheckpointError(
                f"{path}: Orbax parameters without a model configuration: there is neither {metadata_path} "
                f"nor {path / 'config.json'}; put the model's config.json there"
            )
        tokenizer_dir = folders[0]
        config, metadata = read_config_and_metadata(tokenizer_dir / "config.json")
    tensors = {name: _tensor_info(folder, name, leaf) for name, leaf in tree_metadata(folder).items()}
    return OrbaxSource(
        "orbax", path, detected_by, config, tensors, decode_floats, metadata, tokenizer_dir, folder
    )


def _tensor_info(folder: Path, name: str, leaf: jax.ShapeDtypeStruct) -> TensorInfo:
    dtype = DTYPE_NAMES.get(np.dtype(leaf.dtype))
    if dtype is None:
        raise CheckpointError(f"{folder}: tensor {name!r} is {leaf.dtype.name}, not a floating-point type")
    return TensorInfo(leaf.shape, dtype, math.prod(leaf.shape) * leaf.dtype.itemsize, folder, 0)


def abstract_params(config: LlamaConfig, dtype: Any, mesh: Mesh | None) -> dict[str, Any]:
    """Returns the stacked parameter tree of `config` as `ShapeDtypeStruct` leaves with shardings."""
    specs = param_specs(config)

    def abstract(leaf: Leaf) -> jax.ShapeDtypeStruct:
        if mesh is None:
            sharding: Any = jnp.zeros(()).sharding
        else:
            spec: Any = specs
            for key in leaf.path:
                spec = spec[key]
            sharding = named(mesh, spec)
        leaf_dtype = HEAD_DTYPE if leaf is SCORE else dtype
        return jax.ShapeDtypeStruct(leaf.stored_shape(config, "orbax"), leaf_dtype, sharding=sharding)

    return unflatten_dict({leaf.orbax: abstract(leaf) for leaf in leaves(config)}, sep=".")


def _unstack(params: dict[str, Any], config: LlamaConfig, mesh: Mesh | None) -> dict[str, Any]:
    """Splits each stacked leaf into layers, and frees it before the next."""
    layers: tuple[dict[str, Any], ...] = tuple({} for _ in range(config.num_hidden_layers))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        for part, stack in params.pop("layers").items():
            for name in list(stack):
                leaf = stack.pop(name)
                for index, layer in enumerate(layers):
                    layer.setdefault(part, {})[name] = leaf[index]
                jax.block_until_ready(layers)
    return {**params, "layers": layers}
