"""Reads adapters of any kind: told apart by their description, wherever they lie.

`adapter_config.json` names PEFT's kind in `peft_type` (`peft`, `peft_prefix`); one of AdapterHub's has a
`config` within it (`adapterhub`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from llama_jax.weights.safetensors import read_json
from llama_jax.weights.source import quote
from llama_jax.weights.tensors import Tensors

CONFIG = "adapter_config.json"
IN_RUN = "adapter"  # the folder of a training run's directory that holds its adapter
_Reader = Callable[[Path, Mapping[str, Any]], tuple[Settings, dict[str, Any]]]
_READERS: Mapping[str, _Reader] = {"LORA": peft.read_lora, "PREFIX_TUNING": peft_prefix.read_prefix}


def load_adapter(path: str | Path) -> tuple[Settings, dict[str, Any]]:
    """Reads an adapter that PEFT, AdapterHub, `save_adapter` or a training run has written.

    Args:
      path: the adapter's directory, or that of a training run.

    Returns:
      Its settings, and its tree as `adapters.attach` takes it: f32, layers stacked.

    Raises:
      CheckpointError: if a file is missing or malformed, if the adapter is of another kind or does what
        llama_jax does not, or if tensors are missing, unexpected or of the wrong shape.
    """
    folder = adapter_folder(path)
    description = folder / CONFIG
    fields = read_json(description)
    if "peft_type" not in fields and isinstance(fields.get("config"), dict):
        return adapterhub.read_bottleneck(description, fields)
    reader = _READERS.get(str(fields.get("peft_type")))
    if reader is None:
        raise CheckpointError(
            f"{description}: peft_type is {quote(str(fields.get('peft_type')))}; what can be read is LORA "
            "and PREFIX_TUNING of PEFT, and AdapterHub's bottlenecks"
        )
    return reader(description, fields)


def put_on(
    base: Tensors, path: str | Path, into: np.dtype[Any] | None = None
) -> tuple[Tensors, tuple[Settings, Any] | None]:
    """Puts the adapter at `path` on a model, without reading any of that.

    Args:
      base: the model's tensors.
      path: as for `load_adapter`.
      into: what matrices are merged into, see `Merged`.

    Returns:
      The model's tensors with the adapter merged, and the head that was trained along in place of the base's
      output; and, of an adapter that is no change of weights, its settings and tree, to be attached.

    Raises:
      CheckpointError: as `load_adapter`.
      ConfigError: if the adapter is for another model.
    """
    settings, adapter = load_adapter(path)
    head = load_head(path)
    try:
        tensors: Tensors = base
        if isinstance(settings, Lora):
            tensors = Merged(tensors, settings, adapter, into)
        else:
            adapters.check(settings, base.config, adapter)
        if head is not None:
            tensors = WithHead(tensors, head)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return tensors, None if isinstance(settings, Lora) else (settings, adapter)


def load_head(path: str | Path) -> Head | None:
    """Reads the head that was trained along with an adapter; None where there is none.

    Raises:
      CheckpointError: as `load_adapter`, or if it is missing or of no shape for a head.
    """
    folder = adapter_folder(path)
    return read_head(folder / CONFIG, read_json(folder / CONFIG), folder / peft.WEIGHTS)


def adapter_folder(path: str | Path) -> Path:
    """Returns the directory that an adapter's files lie in.

    Raises:
      CheckpointError: if `path` is neither an adapter nor a training run that has one.
    """
    try:
        folder = Path(path).expanduser()
        for place in (folder, folder / IN_RUN):
            if (place / CONFIG).is_file():
                return place
    except (OSError, RuntimeError) as error:  # not to be read, a name too long, no such user's home
        raise CheckpointError(f"{str(path)[:200]}: cannot be read: {error}"[:400]) from None
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file; give the directory with {CONFIG} and {peft.WEIGHTS}")
    what = "holds no adapter" if folder.is_dir() else "is not there"
    raise CheckpointError(
        f"{folder}: {what}; give a directory with {CONFIG} and {peft.WEIGHTS}, as PEFT's save_pretrained "
        f"writes it, or a training run that has one in {IN_RUN}/"
    )


def base_of_run(path: Path) -> str | None:
    """Returns the base that a training run's adapter is for, or None where `path` is no run with an adapter.

    Raises:
      CheckpointError: if its description cannot be read, or names none.
    """
    file = path / IN_RUN / CONFIG
    if not file.is_file():
        return None
    fields = read_json(file)
    base = fields.get("base_model_name_or_path", fields.get("model_name"))
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{file}: names no base_model_name_or_path; load the base, and this as its adapter"
        )
    return base
