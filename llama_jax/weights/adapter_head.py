"""Reads the head that was trained along with an adapter: a classifier's or reward model's.

PEFT keeps it among the adapter's tensors (task_type SEQ_CLS, `score` in modules_to_save), AdapterHub in files
of its own, `head_config.json` and `model_head.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import CheckpointError
from llama_jax.weights.derived import Head
from llama_jax.weights.hf import MOST_LABELS, unnamed
from llama_jax.weights.names import SCORE
from llama_jax.weights.safetensors import read_json, read_metadata, read_safetensors_header
from llama_jax.weights.source import TensorInfo, quote, read_f32

# What PEFT calls it, within its wrapper of the model's matrices and without one.
TENSORS = (f"base_model.model.{SCORE.hf}", f"base_model.{SCORE.hf}")
LABELS = "labels"  # the key of the file's metadata under which we list them: PEFT has no place for them
HUB_CONFIG, HUB_WEIGHTS = "head_config.json", "model_head.safetensors"
CLASSIFIES = "SEQ_CLS"

_MODULES = {"score", "classifier"}  # PEFT names both of the places where a head may be


def check_task(path: Path, fields: Mapping[str, Any]) -> None:
    """Checks that a description of PEFT's is of a language model's adapter or of a classifier's.

    Raises:
      CheckpointError: if it is of another task, or more than a head was trained along.
    """
    task, saved = fields.get("task_type"), fields.get("modules_to_save") or []
    if task not in (None, "CAUSAL_LM", CLASSIFIES):
        raise CheckpointError(
            f"{path}: task_type is {quote(str(task))}; only CAUSAL_LM and {CLASSIFIES} adapters can be read"
        )
    if not isinstance(saved, list) or set(map(str, saved)) - (_MODULES if task == CLASSIFIES else set()):
        raise CheckpointError(
            f"{path}: 'modules_to_save' is {quote(str(saved))}; only a classifier's 'score' can be read"
        )


def without_head(fields: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """A PEFT adapter's tensors but the head that its description says is among them."""
    own = TENSORS if fields.get("task_type") == CLASSIFIES else ()
    return {name: info for name, info in stored.items() if name not in own}


def read_head(description: Path, fields: Mapping[str, Any], tensors: Path) -> Head | None:
    """Reads a head; None of an adapter that has none.

    Args:
      description: the adapter's adapter_config.json.
      fields: what that holds.
      tensors: the adapter's own file.

    Raises:
      CheckpointError: if a file is missing or malformed, or the head is not there or of no shape for one.
    """
    names: tuple[str, ...] = TENSORS
    labels = None
    if "peft_type" not in fields:
        where = description.parent / HUB_CONFIG
        if not where.is_file():
            return None
        labels = _by_number(where, read_json(where).get("label2id"))
        file, names = description.parent / HUB_WEIGHTS, (SCORE.hf,)
    elif fields.get("task_type") == CLASSIFIES:
        file = tensors
    else:
        return None
    stored = read_safetensors_header(file)
    name = next((name for name in names if name in stored), None)
    if name is None:
        raise CheckpointError(f"{file}: missing tensors: {names[0]}, the head that was trained along")
    info = stored[name]
    if len(info.shape) != 2 or not 0 < info.shape[0] <= MOST_LABELS:
        raise CheckpointError(f"{file}: {name} is {list(info.shape)}; it must be [classes, hidden_size]")
    labels = _listed(file, info.shape[0]) if labels is None else labels
    if len(labels) != info.shape[0]:
        raise CheckpointError(
            f"{file}: {name} is of {info.shape[0]} classes, and {HUB_CONFIG} names {len(labels)}; "
            "use those saved together"
        )
    return Head(read_f32(name, info), labels)


def _by_number(path: Path, names: Any) -> tuple[str, ...]:
    """AdapterHub's label2id, as a list."""
    numbers = names.values() if isinstance(names, dict) else ()
    if not names or len(names) > MOST_LABELS or set(map(repr, numbers)) != set(map(str, range(len(names)))):
        raise CheckpointError(f"{path}: label2id does not number its labels from 0")
    return tuple(sorted(names, key=lambda name: int(names[name])))


def _listed(file: Path, count: int) -> tuple[str, ...]:
    """The classes' names, which our own files have beside their tensors."""
    try:
        names = json.loads(read_metadata(file).get(LABELS, ""))
        if len(names) == count and all(isinstance(name, str) for name in names):
            return tuple(names)
    except (ValueError, TypeError, RecursionError):
        pass
    return unnamed(count)
