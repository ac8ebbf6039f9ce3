"""Writes small adapters in PEFT's format, according to its documentation, without `llama_jax.weights`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Hugging Face's modules, with their inputs and outputs.
WIDTH, KV, FF = 16, 8, 24
SIZES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, KV),
    "self_attn.v_proj": (WIDTH, KV),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (WIDTH, FF),
    "mlp.up_proj": (WIDTH, FF),
    "mlp.down_proj": (FF, WIDTH),
}
FIELDS = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "bias": "none"}


def tensors(modules=SIZES, rank=4, layers=2, seed=0):
    """The tensors of a PEFT adapter, according to its documentation."""
    rng = np.random.default_rng(seed)
    made = {}
    for layer in range(layers):
        for module in modules:
            inputs, outputs = SIZES[module]
            name = f"base_model.model.model.layers.{layer}.{module}"
            made[f"{name}.lora_A.weight"] = rng.standard_normal((rank, inputs)).astype(np.float32)
            made[f"{name}.lora_B.weight"] = rng.standard_normal((outputs, rank)).astype(np.float32)
    return made


def write(folder: Path, stored=None, **fields) -> Path:
    folder.mkdir(parents=True)
    stored = tensors() if stored is None else stored
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(FIELDS | fields))
    return folder
