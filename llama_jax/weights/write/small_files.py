"""Small files made in memory: safetensors (README of huggingface/safetensors, section Format) and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np


def safetensors_file(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """The file's bytes; for what is small beside a model, such as an adapter."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, array in tensors.items():
        where = [offset, offset + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": where}
        offset = where[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    return b"".join([start, *(array.astype("<f4").tobytes() for array in tensors.values())])


def json_file(fields: Mapping[str, Any]) -> bytes:
    """The file's bytes, for people to read."""
    return (json.dumps(fields, indent=2) + "\n").encode()
