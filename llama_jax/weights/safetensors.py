"""Parses safetensors headers, with every length and offset checked against the file size.

Layout: the README of huggingface/safetensors, section Format. Tensor data is stored as plain arrays.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llama_jax.errors import CheckpointError
from llama_jax.weights import json_fields
from llama_jax.weights.source import FLOAT_DTYPES, PART_DTYPES, TensorInfo, check_overlaps, open_file, quote

_ITEMSIZES = {name: dtype.itemsize for name, dtype in {**FLOAT_DTYPES, **PART_DTYPES}.items()} | {"C64": 8}


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks the shapes, dtypes and offsets of a safetensors file's tensors.

    Raises:
      CheckpointError: if the file is missing, truncated or malformed, or a tensor has an unsupported dtype.
    """
    header, length, size = _read_header(path)
    header.pop("__metadata__", None)
    tensors = {name: _tensor_info(path, name, entry, 8 + length) for name, entry in header.items()}
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if end != size:
        raise CheckpointError(
            f"{path}: truncated or malformed: its tensors end at byte {end} but the file has {size} bytes; "
            "download it again"
        )
    check_overlaps(path, ((t.offset, t.offset + t.nbytes, name) for name, t in tensors.items()))
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the `__metadata__` strings of a safetensors file.

    Raises:
      CheckpointError: as `read_safetensors_header`.
    """
    metadata = _read_header(path)[0].get("__metadata__")
    items = metadata.items() if isinstance(metadata, dict) else ()
    return {key: value for key, value in items if isinstance(value, str)}


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Returns a file's header, the header's length in bytes, and the file size."""
    limit = json_fields.MAX_JSON_BYTES
    with open_file(path) as (file, size):
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: truncated or malformed: its header claims {length} bytes but the file has "
                f"{size}; download it again"
            )
        if length > limit:
            raise CheckpointError(f"{path}: a header of {length} bytes; at most {limit} are read")
        return json_fields.parse_json(path, file.read(length)), length, size


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """Checks one header entry; `data_start` is the file offset of the tensor data."""

    def malformed(problem: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: tensor {quote(name)} {problem}; the file is malformed, download it again"
        )

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise malformed("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(map(_is_size, numbers)):
            raise malformed(f"has {quote(str(numbers))} where whole numbers should be")
    if len(offsets) != 2:
        raise malformed(f"has {len(offsets)} data_offsets, not 2")
    if not isinstance(dtype, str) or dtype not in _ITEMSIZES:
        raise CheckpointError(
            f"{path}: tensor {quote(name)} has dtype {quote(str(dtype))}, which cannot be read; save it as "
            f"one of {', '.join(FLOAT_DTYPES)}"
        )
    nbytes = math.prod(shape) * _ITEMSIZES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise malformed(f"is {dtype} {shape}, {nbytes} bytes, but its data_offsets are {offsets}")
    return TensorInfo(tuple(shape), dtype, nbytes, path, data_start + offsets[0])


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63
