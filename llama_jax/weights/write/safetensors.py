"""A small safetensors file, made in memory (the README of huggingface/safetensors, section Format)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def safetensors_file(tensors: Mapping[str, np.ndarray]) -> bytes:
    """The file's bytes; for what is small beside a model, such as an adapter."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, array in tensors.items():
        where = [offset, offset + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": where}
        offset = where[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return b"".join([start, *(array.astype("<f4").tobytes() for array in tensors.values())])
