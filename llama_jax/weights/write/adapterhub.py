"""Writes bottleneck adapters in the format of AdapterHub's `adapters`, as its `load_adapter` reads them."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_jax.adapters.bottleneck import Bottleneck
from llama_jax.config import LlamaConfig
from llama_jax.weights.adapter_head import HUB_CONFIG, HUB_WEIGHTS
from llama_jax.weights.adapterhub import ACTIVATIONS, FIXED_FIELDS, LEAF_NAMES, LOCATIONS, WEIGHTS
from llama_jax.weights.adapters import CONFIG
from llama_jax.weights.derived import Head
from llama_jax.weights.hf_families import family_of
from llama_jax.weights.names import SCORE
from llama_jax.weights.write.small_files import json_file, safetensors_file

_ADAPTER_NAME = "llama_jax"


def bottleneck_files(
    settings: Bottleneck, adapter: Any, config: LlamaConfig, base_model: str | None, head: Head | None
) -> dict[str, bytes]:
    """The files of an adapter, and of the classification head trained with it, if any."""
    family = family_of(config)
    common = {
        "hidden_size": config.hidden_size,
        "model_class": family.language_model if head is None else family.classifier,
        "model_name": base_model or "",
        "model_type": family.model_type,
        "version": "adapters.1.3.0",
    }
    files = {
        WEIGHTS: safetensors_file(_tensors(adapter)),
        CONFIG: json_file({"config": _config(settings, config), "name": _ADAPTER_NAME, **common}),
    }
    if head is not None:
        labels = {name: index for index, name in enumerate(head.labels)}
        weight = np.ascontiguousarray(head.weight, np.float32)
        files[HUB_WEIGHTS] = safetensors_file({SCORE.hf: weight})
        files[HUB_CONFIG] = json_file(
            {"config": None, "label2id": labels, "name": None, "num_labels": len(labels), **common}
        )
    return files


def _config(settings: Bottleneck, config: LlamaConfig) -> dict[str, Any]:
    """The fields that differ from AdapterHub's defaults."""
    width, size = config.hidden_size, settings.size
    # AdapterHub computes the size as int(width / reduction_factor).
    factor = width // size if width % size == 0 else width / (size + 0.5)
    return {
        **{field: sublayer in settings.sublayers for sublayer, (_, field) in LOCATIONS.items()},
        "reduction_factor": factor,
        "non_linearity": next(name for name, ours in ACTIVATIONS.items() if ours == settings.activation),
        **FIXED_FIELDS,
        "scaling": 1.0,
    }


def _tensors(adapter: Any) -> dict[str, np.ndarray]:
    """All tensors of the adapter: f32, matrices [out, in]."""
    tensors = {}
    for sublayer, leaves in adapter["layers"].items():
        module = f"{LOCATIONS[sublayer][0]}.adapters.{_ADAPTER_NAME}"
        for name, stack in leaves.items():
            for layer, array in enumerate(np.asarray(stack, np.float32)):
                tensors[f"model.layers.{layer}.{module}.{LEAF_NAMES[name]}"] = array.T
    return tensors
