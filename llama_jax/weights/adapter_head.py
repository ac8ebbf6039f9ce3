"""Reads the classification head (of a classifier or reward model) that was trained together with an adapter.

PEFT stores it among the adapter's tensors (task_type SEQ_CLS, `score` in modules_to_save), AdapterHub in
separate files, `head_config.json` and `model_head.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import CheckpointError
from llama_jax.weights.adapter_file import read_f32, read_header
from llama_jax.weights.derived import Head
from llama_jax.weights.hf import MAX_LABELS, default_labels
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.names import SCORE
from llama_jax.weights.safetensors import read_metadata
from llama_jax.weights.source import TensorInfo, quote

# PEFT's tensor names: in LoRA adapters (whose tuner wraps the model), and in prompt-learning adapters.
HEAD_TENSORS = (f"base_model.model.{SCORE.hf}", f"base_model.{SCORE.hf}")
LABELS_KEY = "labels"  # our key in the safetensors metadata: PEFT's format does not store label names
HUB_CONFIG, HUB_WEIGHTS = "head_config.json", "model_head.safetensors"
SEQ_CLS = "SEQ_CLS"

_HEAD_MODULES = {"score", "classifier"}  # PEFT lists both possible names of a head


def check_task(path: Path, fields: Mapping[str, Any]) -> None:
    """Checks that a PEFT adapter is for a language model or a classifier.

    Raises:
      CheckpointError: if it is for another task, or `modules_to_save` is not a list.
    """
    task, saved = fields.get("task_type"), fields.get("modules_to_save") or []
    if task not in (None, "CAUSAL_LM", SEQ_CLS):
        raise CheckpointError(
            f"{path}: task_type is {quote(str(task))}; only CAUSAL_LM and {SEQ_CLS} adapters are supported"
        )
    if not isinstance(saved, list):
        raise CheckpointError(f"{path}: modules_to_save is {quote(str(saved))}; it must be a list of names")


def check_only_head_saved(path: Path, fields: Mapping[str, Any]) -> None:
    """Checks that an adapter has trained no modules but a classifier's head.

    Raises:
      CheckpointError: naming them.
    """
    saved = fields.get("modules_to_save") or []
    if set(map(str, saved)) - (_HEAD_MODULES if fields.get("task_type") == SEQ_CLS else set()):
        raise CheckpointError(
            f"{path}: modules_to_save is {quote(str(saved))}; only a classifier's score is supported here"
        )


def exclude_head(fields: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Returns a PEFT adapter's tensors without its classification head."""
    head = HEAD_TENSORS if fields.get("task_type") == SEQ_CLS else ()
    return {name: info for name, info in stored.items() if name not in head}


def read_head(config_path: Path, config: Mapping[str, Any], weights: Path) -> Head | None:
    """Reads a head; returns None for an adapter without one.

    Args:
      config_path: the adapter's adapter_config.json.
      config: the contents of that file.
      weights: the adapter's weights, which include the head in PEFT's format.

    Raises:
      CheckpointError: if a file is missing or malformed, or the head is missing or of the wrong shape.
    """
    names: tuple[str, ...] = HEAD_TENSORS
    labels = None
    if "peft_type" not in config:
        head_config = config_path.parent / HUB_CONFIG
        if not head_config.is_file():
            return None
        labels = _labels_by_id(head_config, read_json(head_config).get("label2id"))
        file, names = config_path.parent / HUB_WEIGHTS, (SCORE.hf,)
    elif config.get("task_type") == SEQ_CLS:
        file = weights
    else:
        return None
    stored = read_header(file)
    name = next((name for name in names if name in stored), None)
    if name is None:
        raise CheckpointError(f"{file}: missing tensors: {names[0]}, the adapter's classification head")
    info = stored[name]
    if len(info.shape) != 2 or not 0 < info.shape[0] <= MAX_LABELS:
        raise CheckpointError(f"{file}: {name} is {list(info.shape)}; it must be [classes, hidden_size]")
    labels = _stored_labels(file, info.shape[0]) if labels is None else labels
    if len(labels) != info.shape[0]:
        raise CheckpointError(
            f"{file}: {name} has {info.shape[0]} classes but {HUB_CONFIG} names {len(labels)}; use the files "
            "that were saved together"
        )
    return Head(read_f32(name, info), labels)


def _labels_by_id(path: Path, label2id: Any) -> tuple[str, ...]:
    """Converts AdapterHub's label2id to a tuple of labels."""
    ids = label2id.values() if isinstance(label2id, dict) else ()
    count = len(label2id) if isinstance(label2id, dict) else 0
    if not 0 < count <= MAX_LABELS or set(map(repr, ids)) != set(map(str, range(count))):
        raise CheckpointError(f"{path}: label2id does not number its labels from 0")
    return tuple(sorted(label2id, key=lambda name: int(label2id[name])))


def _stored_labels(file: Path, count: int) -> tuple[str, ...]:
    """Returns the label names in the file's metadata, or Hugging Face's default names."""
    try:
        names = json.loads(read_metadata(file).get(LABELS_KEY, "")) if file.suffix == ".safetensors" else ()
        if len(names) == count and all(isinstance(name, str) for name in names):
            return tuple(names)
    except (ValueError, TypeError, RecursionError):
        pass
    return default_labels(count)
