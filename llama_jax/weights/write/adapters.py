"""Writes adapters atomically, each kind in its own format."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax import adapters
from llama_jax.adapters.bottleneck import Bottleneck
from llama_jax.adapters.lora import Lora
from llama_jax.adapters.prefix import Prefix
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.storage import StorePath, as_path
from llama_jax.weights.adapters import CONFIG
from llama_jax.weights.derived import Head
from llama_jax.weights.run_adapters import ORIGIN
from llama_jax.weights.source import os_error_reason
from llama_jax.weights.write import adapterhub, peft
from llama_jax.weights.write.small_files import json_file
from llama_jax.weights.write.staging import sync_path


def save_adapter(
    path: str | Path,
    settings: adapters.Settings,
    adapter: Any,
    config: LlamaConfig,
    *,
    base_model: str | None = None,
    replace: bool = False,
    head: Head | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an adapter: LoRA and prefixes in PEFT's format, bottleneck adapters in AdapterHub's.

    Args:
      path: the directory to write.
      settings: the adapter's settings.
      adapter: the adapter's tree, as from `adapters.init`, layers stacked; on one device or sharded over a
        mesh.
      config: configuration of the base model.
      base_model: path or Hub name of the base model, for PEFT's `AutoPeftModel`.
      replace: replace an existing adapter.
      head: the classification or reward head trained with the adapter.
      origin: of a training run's adapter, the step and the base model's relative path, see `run_adapters`.

    Returns:
      `path`.

    Raises:
      CheckpointError: if `path` exists (with `replace`, if it is not an adapter), or on a file system error.
      ConfigError: if the adapter does not fit the base model.
    """
    target = as_path(path)
    adapters.check(settings, config, adapter)
    if target.exists() and not (replace and (target / CONFIG).is_file()):
        raise CheckpointError(f"{target}: already exists; remove it, or give another path to write to")
    match settings:
        case Lora():
            files = peft.lora_files(settings, adapter, base_model, head)
        case Prefix():
            files = peft.prefix_files(settings, adapter, config, base_model, head)
        case Bottleneck():
            files = adapterhub.bottleneck_files(settings, adapter, config, base_model, head)
    if origin is not None:
        files[ORIGIN] = json_file(origin)
    if isinstance(target, StorePath):
        for name in sorted(files, key=lambda name: name == CONFIG):  # by which a reader finds the others
            (target / name).write_bytes(files[name])
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as staging_dir:
            new = Path(staging_dir) / "new"
            new.mkdir()
            for name, content in files.items():
                (new / name).write_bytes(content)
                sync_path(new / name)
            sync_path(new)
            if target.exists():
                target.rename(Path(staging_dir) / "replaced")
            new.rename(target)
            sync_path(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written: {os_error_reason(error)}; write elsewhere"
        ) from error
    return target
