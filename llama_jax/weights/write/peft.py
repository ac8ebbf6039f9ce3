"""Writes LoRA adapters and prefixes in the format of Hugging Face's PEFT, for its `from_pretrained`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from llama_jax.adapters.lora import Lora
from llama_jax.adapters.prefix import Prefix
from llama_jax.config import LlamaConfig
from llama_jax.ops.adapted import PROJECTIONS
from llama_jax.weights import adapter_head
from llama_jax.weights.adapter_file import WEIGHTS
from llama_jax.weights.adapters import CONFIG
from llama_jax.weights.derived import Head
from llama_jax.weights.names import EXPERT_LEAVES, LEAVES, Leaf
from llama_jax.weights.peft import LORA_A, LORA_B, LORA_MAGNITUDE
from llama_jax.weights.peft_modules import NAME_PREFIX
from llama_jax.weights.peft_prefix import PROMPT_EMBEDDINGS
from llama_jax.weights.write.small_files import json_file, safetensors_file


def lora_files(settings: Lora, adapter: Any, base_model: str | None, head: Head | None) -> dict[str, bytes]:
    """The files of a LoRA adapter."""
    fields = _lora_fields(settings, adapter, base_model)
    return _files(fields, _lora_tensors(adapter), head, adapter_head.HEAD_TENSORS[0])


def prefix_files(
    settings: Prefix, adapter: Any, config: LlamaConfig, base_model: str | None, head: Head | None
) -> dict[str, bytes]:
    """The files of a prefix."""
    fields = _prefix_fields(settings, config, base_model)
    return _files(fields, {PROMPT_EMBEDDINGS: _prefix_matrix(adapter)}, head, adapter_head.HEAD_TENSORS[1])


def _files(
    fields: dict[str, Any], tensors: dict[str, np.ndarray], head: Head | None, head_name: str
) -> dict[str, bytes]:
    metadata = {}
    if head is not None:
        fields |= {"task_type": adapter_head.SEQ_CLS, "modules_to_save": ["score"]}
        tensors[head_name] = np.ascontiguousarray(head.weight, np.float32)
        metadata[adapter_head.LABELS_KEY] = json.dumps(head.labels)
    return {WEIGHTS: safetensors_file(tensors, metadata), CONFIG: json_file(fields)}


def _lora_fields(settings: Lora, adapter: Any, base_model: str | None) -> dict[str, Any]:
    """The fields of adapter_config.json that differ from PEFT's defaults, and those it requires."""
    modules = {leaf.hf.split(".")[-2] for leaf, _ in _adapted_leaves(adapter)}
    known = [hf for _, hf in PROJECTIONS.values()] + [leaf.hf.split(".")[-2] for leaf in EXPERT_LEAVES]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": [hf for hf in known if hf in modules],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _lora_tensors(adapter: Any) -> dict[str, np.ndarray]:
    """All tensors of the adapter: f32, matrices [out, in]."""
    tensors = {}
    for leaf, stacks in _adapted_leaves(adapter):
        for layer in range(len(stacks["a"])):
            module = NAME_PREFIX + leaf.name("hf", layer).removesuffix(".weight")
            tensors[f"{module}.{LORA_A}"] = stacks["a"][layer].T
            tensors[f"{module}.{LORA_B}"] = stacks["b"][layer].T
            if "magnitude" in stacks:
                tensors[f"{module}.{LORA_MAGNITUDE}"] = stacks["magnitude"][layer]
    return tensors


def _adapted_leaves(adapter: Any) -> Iterator[tuple[Leaf, dict[str, np.ndarray]]]:
    """Yields each adapted matrix with its adapter's arrays [L, ...], f32; those of experts one by one."""
    of_experts = {leaf.path: leaf for leaf in EXPERT_LEAVES}
    for leaf in LEAVES:
        found = adapter["layers"].get(leaf.path[1], {}).get(leaf.path[-1]) if leaf.per_layer else None
        if found is None:
            continue
        stacks = {key: np.asarray(value, np.float32) for key, value in found.items()}
        if stacks["a"].ndim == 3:
            yield leaf, stacks
            continue
        for expert in range(stacks["a"].shape[1]):
            of_expert = dataclasses.replace(of_experts[leaf.path], expert=expert)
            yield of_expert, {key: value[:, expert] for key, value in stacks.items()}


def _prefix_fields(settings: Prefix, config: LlamaConfig, base_model: str | None) -> dict[str, Any]:
    """The fields of adapter_config.json; head counts and widths are those of the keys."""
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


def _prefix_matrix(adapter: Any) -> np.ndarray:
    """f32 [P, L * 2 * K * H]."""
    keys_values = np.stack(
        [np.asarray(adapter["layers"]["attention"][name], np.float32) for name in ("k", "v")]
    )
    by_token = keys_values.transpose(3, 1, 0, 2, 4)  # [2, L, K, P, H] -> [P, L, 2, K, H]
    return by_token.reshape(len(by_token), -1)
