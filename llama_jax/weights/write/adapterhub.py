"""What AdapterHub's `adapters` stores of a bottleneck adapter: its `load_adapter` reads it."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_jax.adapters.bottleneck import Bottleneck
from llama_jax.config import LlamaConfig
from llama_jax.weights.adapter_head import HUB_CONFIG, HUB_WEIGHTS
from llama_jax.weights.adapterhub import ACTIVATIONS, LEAVES, PLACES, PLAIN, WEIGHTS
from llama_jax.weights.adapters import CONFIG
from llama_jax.weights.derived import Head
from llama_jax.weights.hf import CLASSIFIER
from llama_jax.weights.names import SCORE
from llama_jax.weights.write.small_files import json_file, safetensors_file

_NAME = "llama_jax"


def bottleneck_files(
    settings: Bottleneck, adapter: Any, config: LlamaConfig, base_model: str | None, head: Head | None
) -> dict[str, bytes]:
    """The files of an adapter, and of the head that may have been trained along."""
    about = {
        "hidden_size": config.hidden_size,
        "model_class": "LlamaForCausalLM" if head is None else CLASSIFIER,
        "model_name": base_model or "",
        "model_type": "llama",
        "version": "adapters.1.3.0",
    }
    files = {
        WEIGHTS: safetensors_file(_tensors(adapter)),
        CONFIG: json_file({"config": _config(settings, config), "name": _NAME, **about}),
    }
    if head is not None:
        labels = {name: number for number, name in enumerate(head.labels)}
        weight = np.ascontiguousarray(head.weight, np.float32)
        files[HUB_WEIGHTS] = safetensors_file({SCORE.hf: weight})
        files[HUB_CONFIG] = json_file(
            {"config": None, "label2id": labels, "name": None, "num_labels": len(labels), **about}
        )
    return files


def _config(settings: Bottleneck, config: LlamaConfig) -> dict[str, Any]:
    """The fields that say something; AdapterHub has its defaults for the others."""
    width, size = config.hidden_size, settings.size
    # It divides the width by this and rounds down.
    factor = width // size if width % size == 0 else width / (size + 0.5)
    return {
        **{field: part in settings.parts for part, (_, field) in PLACES.items()},
        "reduction_factor": factor,
        "non_linearity": next(name for name, ours in ACTIVATIONS.items() if ours == settings.activation),
        **PLAIN,
        "scaling": 1.0,
    }


def _tensors(adapter: Any) -> dict[str, np.ndarray]:
    """Every tensor of the adapter: f32, matrices [out, in]."""
    made = {}
    for part, leaves in adapter["layers"].items():
        for name, stack in leaves.items():
            for layer, array in enumerate(np.asarray(stack, np.float32)):
                made[f"model.layers.{layer}.{PLACES[part][0]}.adapters.{_NAME}.{LEAVES[name]}"] = array.T
    return made
