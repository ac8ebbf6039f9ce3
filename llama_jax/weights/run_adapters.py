"""Finds and reads the adapter of a training run: the one it exported, or the one in a checkpoint.

A checkpoint of such a run holds the adapter's leaves, and in its run.json the settings and the base model:
{"adapter": {"type": "lora", "rank": 8, ...}, "base_model": [NAME, RELATIVE]}. RELATIVE is the path from the
run's directory, by which a base is found that was moved together with the run; null for a name. A run that
extends the base's context also records that: {"context": {"rope_scaling": {...}, ...}}.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from llama_jax.adapters import Settings
from llama_jax.adapters.bottleneck import Bottleneck
from llama_jax.adapters.lora import Lora
from llama_jax.adapters.prefix import Prefix
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.storage import as_path, is_address
from llama_jax.weights import manifest
from llama_jax.weights.derived import Head
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.names import SCORE
from llama_jax.weights.orbax_tree import read_verified, tree_metadata, verify_arrays
from llama_jax.weights.runs import (
    CHECKPOINTS,
    PARAMS,
    RUN,
    STEP_METADATA_FILE,
    read_step_metadata,
    step_folders,
)
from llama_jax.weights.source import quote

ADAPTER, BASE_MODEL = "adapter", "base_model"  # keys of a step's `run` metadata
CONTEXT = "context"  # likewise, where it is not the base model's
ORIGIN = "origin.json"  # beside an exported adapter: its step, the base's relative path, the context

_TYPES: Mapping[str, type[Any]] = {"lora": Lora, "bottleneck": Bottleneck, "prefix": Prefix}


def step_fields(settings: Settings, base_model: str, run: Path) -> dict[str, Any]:
    """What a step's `run` metadata says of its adapter.

    Args:
      settings: the adapter's settings.
      base_model: the base model: a path, or a name.
      run: the run's directory.
    """
    kind = next(name for name, cls in _TYPES.items() if isinstance(settings, cls))
    return {
        ADAPTER: {"type": kind, **dataclasses.asdict(settings)},
        BASE_MODEL: list(portable_path(base_model, run)),
    }


def context_fields(config: LlamaConfig) -> dict[str, Any]:
    """What is recorded of the context of an adapter's model, JSON-serializable."""
    scaling = config.rope_scaling
    return {
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else dataclasses.asdict(scaling),
    }


def read_context(folder: Path) -> dict[str, Any] | None:
    """The context that an adapter was trained with, as arguments of `WithContext`; None if it is the base's.

    Args:
      folder: the directory of the adapter's files, or a run's step.

    Raises:
      CheckpointError: if the record is malformed.
    """
    path = folder / RUN / STEP_METADATA_FILE if is_step(folder) else folder / ORIGIN
    if not path.is_file():
        return None
    fields = read_step_metadata(folder).run if is_step(folder) else read_json(path)
    if CONTEXT not in fields:
        return None
    try:
        context, names = dict(fields[CONTEXT]), ("max_position_embeddings", "rope_theta", "rope_scaling")
        if scaling := context["rope_scaling"]:
            context["rope_scaling"] = RopeScaling(**scaling)
        LlamaConfig(**context)  # checks the values
        return {name: context[name] for name in names}
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        detail = quote(" ".join(str(error).split()))
        raise CheckpointError(f"{path}: not the context of a model: {detail}") from None


def portable_path(name: str, run: Path) -> tuple[str, str | None]:
    """Returns a path as an absolute one, and relative to a run's directory; a name stays as it is, with None.

    A relative path such as `runs/base` would be taken for a repository of the Hub in another directory.
    """
    try:
        path = as_path(name).expanduser().absolute()
        if not path.exists():
            return name, None
        path, run = path.resolve(), run.expanduser().resolve()
        if is_address(path) != is_address(run) or (is_address(path) and path.parts[:2] != run.parts[:2]):
            return str(path), None
        return str(path), os.path.relpath(path, run)
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown user
        return name, None


def newest_adapter(path: Path, exported: Path | None) -> Path | None:
    """Returns the directory of a run's newest adapter: `exported`, or that of a step.

    Args:
      path: a directory: of a training run, of one of its steps, or any other.
      exported: the directory of the adapter that the run has exported, if it has.

    Returns:
      `exported` unless a step is newer; None if `path` is no run, or no step holds an adapter.
    """
    if is_step(path):
        return path if ADAPTER in read_step_metadata(path).run else None
    last = _exported_step(exported)
    for number, folder in reversed(step_folders(path).items()):
        if exported is not None and (last is None or number <= last):
            break
        try:
            if ADAPTER not in read_step_metadata(folder).run:
                break
            manifest.verify(folder / PARAMS)
            verify_arrays(folder / PARAMS)
            return folder
        except CheckpointError:
            continue  # damaged, or deleted meanwhile
    return exported


def is_step(path: Path) -> bool:
    """Whether a directory is a step of a training run."""
    return (path / RUN / STEP_METADATA_FILE).is_file()


def run_of(path: Path) -> Path:
    """Returns the directory of the run that an adapter's or a step's directory is in."""
    path = path.absolute()
    return path.parent.parent if path.parent.name == CHECKPOINTS else path.parent


def read_step_adapter(step: Path) -> tuple[Settings, dict[str, Any], Head | None]:
    """Reads the adapter in a step, and its head if it has one.

    Returns:
      The settings, the adapter's tree for `adapters.attach` (f32, layers stacked), and the head or None.

    Raises:
      CheckpointError: if a file is damaged, or its metadata are not those of an adapter.
    """
    folder = step / PARAMS
    manifest.verify(step, quick=True)
    manifest.verify(folder)
    metadata = read_step_metadata(step)
    settings = _settings(step, metadata.run.get(ADAPTER))
    leaves = tree_metadata(folder)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=here) for name, leaf in leaves.items()
    }
    tree = jax.tree.map(np.asarray, read_verified(folder, unflatten_dict(abstract, sep=".")))
    head = None
    if metadata.config.labels:
        if SCORE.orbax not in leaves:
            raise CheckpointError(f"{folder}: missing tensors: {SCORE.orbax}, the classification head")
        head = Head(tree["score"]["kernel"].T, metadata.config.labels)
    if "layers" not in tree:
        raise CheckpointError(f"{folder}: has no adapter; give a step of a run that trains one")
    return settings, jax.tree.map(jnp.asarray, {"layers": tree["layers"]}), head


def base_model(folder: Path, named: str | None = None) -> str:
    """Finds the base model of an adapter in a run: where it was, else beside the run if both were moved.

    Args:
      folder: the directory of the step, or of the exported adapter.
      named: what adapter_config.json of an exported adapter says.

    Raises:
      CheckpointError: if it is a path at which there is nothing any more.
    """
    run, relative, typed = run_of(folder), None, False
    if named is None:
        fields = read_step_metadata(folder).run.get(BASE_MODEL)
        if not (isinstance(fields, list) and len(fields) == 2 and isinstance(fields[0], str)):
            raise CheckpointError(f"{folder}: does not say what base model its adapter was trained on")
        named, relative = fields
    elif (folder / ORIGIN).is_file():
        relative = read_json(folder / ORIGIN).get(BASE_MODEL)
    else:
        typed = "/" in named  # a path as it was typed, in the directory in which the run was started
    path = as_path(named)
    if _exists(path):
        return named
    beside = [(run / relative).absolute()] if isinstance(relative, str) else []
    beside += [parent / path for parent in run.parents if typed]
    found = next((candidate for candidate in beside if _exists(candidate)), None)
    if found is not None:
        return str(found)
    if path.is_absolute():
        raise CheckpointError(
            f"{run}: the base model that its adapter was trained on is not there: {named}; put it back, or "
            f"give it as the model, with --adapter {folder}"
        )
    return named  # a known model, or a repository


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _exported_step(exported: Path | None) -> int | None:
    """The step that an exported adapter is of; None if its files do not say."""
    if exported is None or not (exported / ORIGIN).is_file():
        return None
    step = read_json(exported / ORIGIN).get("step")
    return step if type(step) is int else None


def _settings(step: Path, fields: Any) -> Settings:
    try:
        fields = dict(fields)
        settings_type = _TYPES[fields.pop("type")]
        return settings_type(**fields)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        detail = quote(" ".join(str(error).split()))
        raise CheckpointError(
            f"{step / RUN / STEP_METADATA_FILE}: not the settings of an adapter: {detail}"
        ) from None
