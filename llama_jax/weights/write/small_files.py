"""Encodes safetensors (README of huggingface/safetensors, section Format) and JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np


def safetensors_header(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The first bytes of a safetensors file: the length of the JSON header, and the header padded to 8 bytes.

    Args:
      tensors: name, dtype, shape and size in bytes of each tensor, in file order.
      metadata: entries of `__metadata__` beside the format.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, dtype, shape, nbytes in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_file(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """A whole safetensors file of f32 tensors, for small contents such as an adapter."""
    arrays = {name: np.asarray(array, "<f4") for name, array in tensors.items()}
    header = safetensors_header(((name, "F32", x.shape, x.nbytes) for name, x in arrays.items()), metadata)
    return b"".join([header, *(array.tobytes() for array in arrays.values())])


def json_file(fields: Mapping[str, Any]) -> bytes:
    """An indented JSON file."""
    return (json.dumps(fields, indent=2) + "\n").encode()
