"""Reads adapters of any type, in PEFT's or AdapterHub's format; the type is read from adapter_config.json.

PEFT's file has a `peft_type` (see `peft`, `peft_prefix`), AdapterHub's a nested `config` (see `adapterhub`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llama_jax import adapters
from llama_jax.adapters import Settings
from llama_jax.adapters.lora import Lora
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.weights import adapterhub, peft, peft_prefix
from llama_jax.weights.adapter_head import read_head
from llama_jax.weights.derived import Head, Merged, WithHead
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.source import quote
from llama_jax.weights.tensors import Tensors

CONFIG = "adapter_config.json"
RUN_ADAPTER_DIR = "adapter"  # subdirectory of a training run with its adapter


def load_adapter(path: str | Path, num_layers: int | None = None) -> tuple[Settings, dict[str, Any]]:
    """Reads an adapter written by PEFT, AdapterHub, `save_adapter` or a training run.

    Args:
      path: the directory of the adapter or of a training run.
      num_layers: of the base model, which a LoRA adapter of some layers only does not say.

    Returns:
      The settings, and the adapter's tree for `adapters.attach`: f32, layers stacked.

    Raises:
      CheckpointError: if a file is missing or malformed, the adapter is of an unsupported type or uses an
        unsupported feature, or tensors are missing, unexpected or of the wrong shape.
    """
    folder = adapter_folder(path)
    config_path = folder / CONFIG
    config = read_json(config_path)
    if "peft_type" not in config and isinstance(config.get("config"), dict):
        return adapterhub.read_bottleneck(config_path, config)
    if config.get("peft_type") == "LORA":
        return peft.read_lora(config_path, config, num_layers)
    if config.get("peft_type") == "PREFIX_TUNING":
        return peft_prefix.read_prefix(config_path, config)
    raise CheckpointError(
        f"{config_path}: peft_type is {quote(str(config.get('peft_type')))}; only PEFT's LORA and "
        "PREFIX_TUNING and AdapterHub's bottleneck adapters are supported"
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
    settings, adapter = load_adapter(path, base.config.num_hidden_layers)
    head = load_head(path)
    try:
        tensors: Tensors = base
        if isinstance(settings, Lora):
            tensors = Merged(tensors, settings, adapter, merged_dtype)
        else:
            adapters.check(settings, base.config, adapter)
        if head is not None:
            tensors = WithHead(tensors, head)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return tensors, None if isinstance(settings, Lora) else (settings, adapter)


def load_head(path: str | Path) -> Head | None:
    """Reads the classification head trained together with an adapter; returns None if there is none.

    Raises:
      CheckpointError: as `load_adapter`, or if the head is missing or of the wrong shape.
    """
    folder = adapter_folder(path)
    return read_head(folder / CONFIG, read_json(folder / CONFIG), folder / peft.WEIGHTS)


def adapter_folder(path: str | Path) -> Path:
    """Returns the directory of an adapter's files.

    Raises:
      CheckpointError: if `path` is neither an adapter nor a training run with one.
    """
    try:
        folder = Path(path).expanduser()
        for candidate in (folder, folder / RUN_ADAPTER_DIR):
            if (candidate / CONFIG).is_file():
                return candidate
    except (OSError, RuntimeError) as error:  # no permission, a name too long, an unknown user
        raise CheckpointError(f"{str(path)[:200]}: cannot be read: {error}"[:400]) from None
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; give the directory with {CONFIG} and {peft.WEIGHTS}")
    problem = "has no adapter" if folder.is_dir() else "does not exist"
    raise CheckpointError(
        f"{folder}: {problem}; give a directory with {CONFIG} and {peft.WEIGHTS}, as PEFT's save_pretrained "
        f"writes it, or a training run with an adapter in {RUN_ADAPTER_DIR}/"
    )


def run_base_model(path: Path) -> str | None:
    """Returns the base model of a training run's adapter; None if `path` is not a run with an adapter.

    Raises:
      CheckpointError: if adapter_config.json cannot be read, or names no base model.
    """
    file = path / RUN_ADAPTER_DIR / CONFIG
    if not file.is_file():
        return None
    fields = read_json(file)
    base = fields.get("base_model_name_or_path", fields.get("model_name"))
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{file}: base_model_name_or_path is missing; load the base model, and this as its adapter"
        )
    return base
