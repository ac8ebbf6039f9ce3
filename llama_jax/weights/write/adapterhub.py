"""What AdapterHub's `adapters` stores of a bottleneck adapter: its `load_adapter` reads it."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_jax.bottleneck import Bottleneck
from llama_jax.config import LlamaConfig
from llama_jax.weights.adapterhub import ACTIVATIONS, LEAVES, PLACES

_NAME = "llama_jax"


def fields(settings: Bottleneck, config: LlamaConfig, base_model: str | None) -> dict[str, Any]:
    """What its adapter_config.json holds; AdapterHub has its defaults for the other fields."""
    width, size = config.hidden_size, settings.size
    # It divides the width by this and rounds down.
    factor = width // size if width % size == 0 else width / (size + 0.5)
    return {
        "config": {
            **{field: part in settings.parts for part, (_, field) in PLACES.items()},
            "reduction_factor": factor,
            "non_linearity": next(name for name, ours in ACTIVATIONS.items() if ours == settings.activation),
            "original_ln_before": False,
            "original_ln_after": True,
            "residual_before_ln": True,
            "adapter_residual_before_ln": False,
            "ln_before": False,
            "ln_after": False,
            "is_parallel": False,
            "scaling": 1.0,
        },
        "hidden_size": width,
        "model_class": "LlamaForCausalLM",
        "model_name": base_model or "",
        "model_type": "llama",
        "name": _NAME,
        "version": "adapters.1.3.0",
    }


def tensors(adapter: Any) -> dict[str, np.ndarray]:
    """Every tensor of its adapter.safetensors: f32, matrices [out, in]."""
    made = {}
    for part, leaves in adapter["layers"].items():
        for name, stack in leaves.items():
            for layer, array in enumerate(np.asarray(stack, np.float32)):
                made[f"model.layers.{layer}.{PLACES[part][0]}.adapters.{_NAME}.{LEAVES[name]}"] = array.T
    return made
