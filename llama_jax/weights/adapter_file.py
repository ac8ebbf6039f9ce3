"""The file with an adapter's tensors: safetensors, or a torch checkpoint as older versions of PEFT wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llama_jax.weights.safetensors import read_safetensors_header
from llama_jax.weights.source import TensorInfo
from llama_jax.weights.torch_zip import read_tensor, read_torch_zip

WEIGHTS, TORCH_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"


def weights_path(config_path: Path) -> Path:
    """Returns the path of the tensors of the adapter with this adapter_config.json."""
    file = config_path.parent / WEIGHTS
    torch_file = file.with_name(TORCH_WEIGHTS)
    return torch_file if torch_file.exists() and not file.exists() else file


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Reads and checks the shapes, dtypes and locations of an adapter's tensors.

    Raises:
      CheckpointError: if the file is missing or malformed.
    """
    if file.name == TORCH_WEIGHTS:
        return dict(read_torch_zip(file))
    return read_safetensors_header(file)


def read_f32(name: str, info: TensorInfo) -> np.ndarray:
    """Reads a tensor of any floating-point dtype as f32."""
    return read_tensor(name, info).astype(np.float32)
