"""What Hugging Face's PEFT stores of low-rank adapters and of prefixes: its `from_pretrained` reads them."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.lora import PROJECTIONS, Lora
from llama_jax.prefix import Prefix
from llama_jax.weights.names import LEAVES
from llama_jax.weights.peft import MAGNITUDE, PREFIX, A, B
from llama_jax.weights.peft_prefix import TENSOR


def lora_fields(settings: Lora, adapter: Any, base_model: str | None) -> dict[str, Any]:
    """The fields of its adapter_config.json that say something; PEFT has its defaults for the others."""
    names = [name for matrices in adapter["layers"].values() for name in matrices]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": [hf for name, (_, hf) in PROJECTIONS.items() if name in names],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def lora_tensors(adapter: Any) -> dict[str, np.ndarray]:
    """Every tensor of its adapter_model.safetensors: f32, matrices [out, in]."""
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


def prefix_fields(settings: Prefix, config: LlamaConfig, base_model: str | None) -> dict[str, Any]:
    """The fields of a prefix's adapter_config.json, its sizes those of the keys."""
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": settings.length,
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_key_value_heads,
        "token_dim": config.num_key_value_heads * config.head_dim,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
    }


def prefix_tensors(adapter: Any) -> dict[str, np.ndarray]:
    """A prefix's one tensor f32 [P, L * 2 * K * H]."""
    both = np.stack([np.asarray(adapter["layers"]["attention"][name], np.float32) for name in ("k", "v")])
    by_token = both.transpose(3, 1, 0, 2, 4)  # [2, L, K, P, H] -> [P, L, 2, K, H]
    return {TENSOR: by_token.reshape(len(by_token), -1)}
