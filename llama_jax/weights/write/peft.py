"""Writes adapters in the format of Hugging Face's PEFT: which its `PeftModel.from_pretrained` reads."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax import lora
from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.model import init
from llama_jax.weights.derived import Head
from llama_jax.weights.names import LEAVES
from llama_jax.weights.peft import CONFIG, HEAD, LABELS, MAGNITUDE, PREFIX, WEIGHTS, A, B
from llama_jax.weights.source import reason
from llama_jax.weights.write.staging import sync_path


def save_adapter(
    path: str | Path,
    settings: lora.Lora,
    adapter: Any,
    config: LlamaConfig,
    *,
    base_model: str | None = None,
    replace: bool = False,
    head: Head | None = None,
) -> Path:
    """Writes an adapter as PEFT's `save_pretrained` does; the directory appears when it is whole.

    Args:
      path: the directory to write.
      settings: what the adapter was made with.
      adapter: its tree as `lora.init` makes it, layers stacked; on one device or on a mesh.
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
    lora.check(jax.eval_shape(lambda: init(config, jax.random.key(0))), adapter)
    if target.exists() and not (replace and (target / CONFIG).is_file()):
        raise CheckpointError(f"{target}: is there already; remove it, or give another path to write to")
    fields = json.dumps(_fields(settings, adapter, base_model, head), indent=2) + "\n"
    tensors, metadata = _tensors(adapter), {"format": "pt"}
    if head is not None:
        tensors[HEAD] = np.ascontiguousarray(head.weight, np.float32)
        metadata[LABELS] = json.dumps(head.labels)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
            made = Path(beside) / "made"
            made.mkdir()
            (made / WEIGHTS).write_bytes(_safetensors(tensors, metadata))
            (made / CONFIG).write_text(fields, encoding="utf-8")
            for written in (made / WEIGHTS, made / CONFIG, made):
                sync_path(written)
            if target.exists():
                target.rename(Path(beside) / "replaced")
            made.rename(target)
            sync_path(target.parent)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {reason(error)}; write elsewhere") from error
    return target


def _fields(settings: lora.Lora, adapter: Any, base_model: str | None, head: Head | None) -> dict[str, Any]:
    """The fields of an adapter_config.json that say something; PEFT has its defaults for the others."""
    names = [name for matrices in adapter["layers"].values() for name in matrices]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        **({} if head is None else {"modules_to_save": ["score"]}),
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": [hf for name, (_, hf) in lora.PROJECTIONS.items() if name in names],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _tensors(adapter: Any) -> dict[str, np.ndarray]:
    """Every tensor of the file: f32, matrices [out, in]."""
    tensors = {}
    for leaf in LEAVES:
        own = adapter["layers"].get(leaf.path[1], {}).get(leaf.path[-1]) if leaf.per_layer else None
        if own is None:
            continue
        stacks = {key: np.asarray(value, np.float32) for key, value in own.items()}
        for layer in range(len(stacks["a"])):
            module = PREFIX + leaf.name("hf", layer).removesuffix(".weight")
            tensors[f"{module}.{A}"] = stacks["a"][layer].T
            tensors[f"{module}.{B}"] = stacks["b"][layer].T
            if "magnitude" in stacks:
                tensors[f"{module}.{MAGNITUDE}"] = stacks["magnitude"][layer]
    return tensors


def _safetensors(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """A safetensors file of f32 tensors (the README of huggingface/safetensors, section Format)."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, array in tensors.items():
        where = [offset, offset + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": where}
        offset = where[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return b"".join([start, *(array.astype("<f4").tobytes() for array in tensors.values())])
