"""Reads adapters of any type, in PEFT's or AdapterHub's format; the type is read from adapter_config.json.

PEFT's file has a `peft_type` (see `peft`, `peft_prefix`), AdapterHub's a nested `config` (see `adapterhub`).
Those in a training run's checkpoints are read by `run_adapters`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import adapters
from llama_jax.adapters import Settings
from llama_jax.adapters.lora import Lora
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.storage import as_path
from llama_jax.weights import adapterhub, peft_prefix, run_adapters
from llama_jax.weights.adapter_file import WEIGHTS, weights_path
from llama_jax.weights.adapter_head import read_head
from llama_jax.weights.derived import Head, WithContext, WithHead
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.merged import Changed, Merged
from llama_jax.weights.peft import PeftLora, read_lora
from llama_jax.weights.peft_fields import MERGE_HINT
from llama_jax.weights.runs import is_run
from llama_jax.weights.source import format_list, quote
from llama_jax.weights.tensors import Tensors

CONFIG = "adapter_config.json"
RUN_ADAPTER_DIR = "adapter"  # subdirectory of a training run with its adapter
_TRIES = 5  # to read a step's adapter while its run saves others and deletes it

_Found = PeftLora | tuple[Settings, dict[str, Any]]


def load_adapter(path: str | Path, num_layers: int | None = None) -> tuple[Settings, dict[str, Any]]:
    """Reads an adapter written by PEFT, AdapterHub, `save_adapter` or a training run.

    Args:
      path: the directory of the adapter, of a training run, or of one of its steps.
      num_layers: of the base model, which a LoRA adapter of some layers only does not say.

    Returns:
      The settings, and the adapter's tree for `adapters.attach`: f32, layers stacked.

    Raises:
      CheckpointError: if a file is missing or malformed, the adapter is of an unsupported type or uses an
        unsupported feature, or tensors are missing, unexpected or of the wrong shape; or if the adapter also
        changes what `attach` does not, such as the embedding: `load` and `convert` merge it.
    """
    found, _, _ = _read(path, num_layers)
    return found.require_attachable() if isinstance(found, PeftLora) else found


def _read(path: str | Path, num_layers: int | None) -> tuple[_Found, Head | None, dict[str, Any] | None]:
    """Reads an adapter; the classification head trained with it or None; its context (`read_context`)."""
    for _ in range(_TRIES):
        folder = adapter_folder(path)
        if not run_adapters.is_step(folder):
            break
        try:
            settings, tree, head = run_adapters.read_step_adapter(folder)
            return (settings, tree), head, run_adapters.read_context(folder)
        except CheckpointError:
            if folder.exists():
                raise  # else the run has deleted it, and has a newer one
    config_path = folder / CONFIG
    config = read_json(config_path)
    head = read_head(config_path, config, weights_path(config_path))
    return _read_files(config_path, config, num_layers), head, run_adapters.read_context(folder)


def _read_files(config_path: Path, config: dict[str, Any], num_layers: int | None) -> _Found:
    if "peft_type" not in config and isinstance(config.get("config"), dict):
        return adapterhub.read_bottleneck(config_path, config)
    if config.get("peft_type") in ("LORA", "TRAINABLE_TOKENS"):
        return read_lora(config_path, config, num_layers)
    if config.get("peft_type") == "PREFIX_TUNING":
        return peft_prefix.read_prefix(config_path, config)
    raise CheckpointError(
        f"{config_path}: peft_type is {quote(str(config.get('peft_type')))}; only PEFT's LORA, "
        "TRAINABLE_TOKENS and PREFIX_TUNING and AdapterHub's bottleneck adapters are supported; another one "
        "that PEFT can merge: " + MERGE_HINT
    )


def apply_adapter(
    base: Tensors, path: str | Path, merged_dtype: np.dtype[Any] | None = None
) -> tuple[Tensors, tuple[Settings, Any] | None]:
    """Applies the adapter at `path` to a model lazily: the model's tensors are not read yet.

    Args:
      base: the model's tensors.
      path: as for `load_adapter`.
      merged_dtype: dtype of merged matrices, see `Merged`.

    Returns:
      The model's tensors, with a LoRA adapter merged and with the adapter's classification head if it has
      one; and, for an adapter that cannot be merged, its settings and tree to attach, else None.

    Raises:
      CheckpointError: as `load_adapter`.
      ConfigError: if the adapter is for another model.
    """
    found, head, context = _read(path, base.config.num_hidden_layers)
    tensors, attached = base if context is None else WithContext(base, **context), None
    try:
        if isinstance(found, PeftLora):
            changes, untied = found.others.resolve(base.config)
            if changes:
                tensors = Changed(tensors, changes, untied, merged_dtype)
            if found.settings is not None:
                tensors = Merged(tensors, found.settings, found.tree, merged_dtype, found.initial)
        elif isinstance(found[0], Lora):
            tensors = Merged(tensors, found[0], found[1], merged_dtype)
        else:
            adapters.check(found[0], base.config, found[1])
            attached = found
        if head is not None:
            tensors = WithHead(tensors, head)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return tensors, attached


def load_head(path: str | Path) -> Head | None:
    """Reads the classification head trained together with an adapter; returns None if there is none.

    Raises:
      CheckpointError: as `load_adapter`, or if the head is missing or of the wrong shape.
    """
    folder = adapter_folder(path)
    if run_adapters.is_step(folder):
        return run_adapters.read_step_adapter(folder)[2]
    return read_head(folder / CONFIG, read_json(folder / CONFIG), weights_path(folder / CONFIG))


def adapter_folder(path: str | Path) -> Path:
    """Returns the directory of an adapter's files, of a training run that of its newest adapter.

    Raises:
      CheckpointError: if `path` is neither an adapter, nor a directory with one in a subdirectory, which PEFT
        gives an adapter's name, nor a training run with one.
    """
    try:
        folder = as_path(path).expanduser()
        found = _find_adapters(folder)
    except (OSError, RuntimeError) as error:  # no permission, a name too long, an unknown user
        raise CheckpointError(f"{str(path)[:200]}: cannot be read: {error}"[:400]) from None
    if len(found) == 1:
        return found[0]
    if found:
        names = format_list([candidate.name for candidate in found], 8)
        raise CheckpointError(f"{folder}: has several adapters ({names}); give the directory of one")
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; give the directory with {CONFIG} and {WEIGHTS}")
    problem = "has no adapter" if folder.is_dir() else "does not exist"
    raise CheckpointError(
        f"{folder}: {problem}; give a directory with {CONFIG} and {WEIGHTS}, as PEFT's save_pretrained "
        "writes it, or a training run that trains an adapter"
    )


def _find_adapters(path: Path) -> list[Path]:
    """Returns the directories of the adapters that `path` may stand for: none, the one, or several."""
    if (path / CONFIG).is_file():
        return [path]
    if is_run(path) or run_adapters.is_step(path) or (path / RUN_ADAPTER_DIR / CONFIG).is_file():
        exported = path / RUN_ADAPTER_DIR
        newest = run_adapters.newest_adapter(path, exported if (exported / CONFIG).is_file() else None)
        return [] if newest is None else [newest]
    return sorted(entry for entry in path.iterdir() if (entry / CONFIG).is_file()) if path.is_dir() else []


def base_of_adapter(path: Path) -> str | Path | None:
    """Returns the base model of an adapter that is loaded as a model; None if `path` is another model.

    As in transformers, an adapter beside a whole model (config.json) is applied to that model.

    Raises:
      CheckpointError: if a file cannot be read or names no base model, or that of a run is not there.
    """
    if not path.is_dir():
        return None
    has_model = (path / "config.json").is_file()
    if has_model or not (found := _find_adapters(path)):
        return path if has_model and (path / CONFIG).is_file() else None
    folder = found[0] if len(found) == 1 else adapter_folder(path)  # raises for several
    if run_adapters.is_step(folder):
        return run_adapters.base_model(folder)
    fields = read_json(folder / CONFIG)
    base = fields.get("base_model_name_or_path", fields.get("model_name"))
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder / CONFIG}: base_model_name_or_path is missing; load the base model, and this as its "
            "adapter"
        )
    if is_run(path):
        return run_adapters.base_model(folder, base)
    revision = fields.get("revision")
    named = isinstance(revision, str) and revision and "@" not in base and not as_path(base).exists()
    return f"{base}@{revision}" if named else base
