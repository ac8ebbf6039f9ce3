"""Writes adapters of any kind, each in its own format; the directory appears when it is whole."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from llama_jax import adapters
from llama_jax.adapters.bottleneck import Bottleneck
from llama_jax.adapters.lora import Lora
from llama_jax.adapters.prefix import Prefix
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.weights.adapters import CONFIG
from llama_jax.weights.derived import Head
from llama_jax.weights.source import reason
from llama_jax.weights.write import adapterhub, peft
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
) -> Path:
    """Writes an adapter: low-rank ones and prefixes as PEFT does, bottlenecks as AdapterHub does.

    Args:
      path: the directory to write.
      settings: what the adapter was made with.
      adapter: its tree as `adapters.init` makes it, layers stacked; on one device or on a mesh.
      config: the base it is for.
      base_model: where the base is to be had, for people and for PEFT's `AutoPeftModel`.
      replace: put it in the place of an adapter that is there.
      head: a classifier's or reward model's, that was trained along.

    Returns:
      `path`.

    Raises:
      CheckpointError: if something (with `replace`, something that is no adapter) is at `path`, or the
        file system refuses.
      ConfigError: if the adapter is not of this base.
    """
    target = Path(path)
    adapters.check(settings, config, adapter)
    if target.exists() and not (replace and (target / CONFIG).is_file()):
        raise CheckpointError(f"{target}: is there already; remove it, or give another path to write to")
    match settings:
        case Lora():
            files = peft.lora_files(settings, adapter, base_model, head)
        case Prefix():
            files = peft.prefix_files(settings, adapter, config, base_model, head)
        case Bottleneck():
            files = adapterhub.bottleneck_files(settings, adapter, config, base_model, head)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
            made = Path(beside) / "made"
            made.mkdir()
            for name, content in files.items():
                (made / name).write_bytes(content)
                sync_path(made / name)
            sync_path(made)
            if target.exists():
                target.rename(Path(beside) / "replaced")
            made.rename(target)
            sync_path(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {reason(error)}; write elsewhere") from error
    return target
