"""Writes adapters of any kind, each in its own format; the directory appears when it is whole."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax

from llama_jax import adapters
from llama_jax.bottleneck import Bottleneck
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.lora import Lora
from llama_jax.model import init
from llama_jax.prefix import Prefix
from llama_jax.weights import adapterhub, peft
from llama_jax.weights.adapters import CONFIG
from llama_jax.weights.source import reason
from llama_jax.weights.write import adapterhub as write_adapterhub
from llama_jax.weights.write import peft as write_peft
from llama_jax.weights.write.safetensors import safetensors_file
from llama_jax.weights.write.staging import sync_path


def save_adapter(
    path: str | Path,
    settings: adapters.Settings,
    adapter: Any,
    config: LlamaConfig,
    *,
    base_model: str | None = None,
    replace: bool = False,
) -> Path:
    """Writes an adapter: low-rank ones and prefixes as PEFT does, bottlenecks as AdapterHub does.

    Args:
      path: the directory to write.
      settings: what the adapter was made with.
      adapter: its tree as `adapters.init` makes it, layers stacked; on one device or on a mesh.
      config: the base it is for.
      base_model: where the base is to be had, for people and for PEFT's `AutoPeftModel`.
      replace: put it in the place of an adapter that is there.

    Returns:
      `path`.

    Raises:
      CheckpointError: if something (with `replace`, something that is no adapter) is at `path`, or the
        file system refuses.
      ConfigError: if the adapter is not of this base.
    """
    target = Path(path)
    base = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    jax.eval_shape(lambda base, adapter: adapters.attach(settings, base, adapter), base, adapter)
    if target.exists() and not (replace and (target / CONFIG).is_file()):
        raise CheckpointError(f"{target}: is there already; remove it, or give another path to write to")
    match settings:
        case Lora():
            name, fields = peft.WEIGHTS, write_peft.lora_fields(settings, adapter, base_model)
            tensors = write_peft.lora_tensors(adapter)
        case Prefix():
            name, fields = peft.WEIGHTS, write_peft.prefix_fields(settings, config, base_model)
            tensors = write_peft.prefix_tensors(adapter)
        case Bottleneck():
            name, fields = adapterhub.WEIGHTS, write_adapterhub.fields(settings, config, base_model)
            tensors = write_adapterhub.tensors(adapter)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
            made = Path(beside) / "made"
            made.mkdir()
            (made / name).write_bytes(safetensors_file(tensors))
            (made / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
            for written in (made / name, made / CONFIG, made):
                sync_path(written)
            if target.exists():
                target.rename(Path(beside) / "replaced")
            made.rename(target)
            sync_path(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {reason(error)}; write elsewhere") from error
    return target
