"""Parses a safetensors file's header, with every length and offset checked against the file's size.

Layout: the README of huggingface/safetensors, section Format. The tensors' bytes are then plain arrays.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llama_jax.errors import CheckpointError
from llama_jax.weights.source import FLOAT_DTYPES, TensorInfo, check_overlaps, open_file, quote

# The limit of the safetensors library itself, which keeps a hostile header from filling memory.
MAX_HEADER = 100_000_000


def read_safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks where a safetensors file's tensors lie.

    Raises:
      CheckpointError: if the file is missing, truncated or malformed, or a tensor has a type that
        cannot be read.
    """
    header, length, size = _header(path)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if end != size:
        raise CheckpointError(
            f"{path}: truncated or malformed: its tensors end at byte {end} but the file has {size} bytes; "
            "get it again"
        )
    check_overlaps(path, ((t.offset, t.offset + t.nbytes, name) for name, t in tensors.items()))
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Reads what a safetensors file says beside its tensors.

    Raises:
      CheckpointError: as `read_safetensors_header`.
    """
    found = _header(path)[0].get("__metadata__")
    held = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in held if isinstance(value, str)}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """A file's header, its length, and the file's size."""
    with open_file(path) as (file, size):
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise CheckpointError(
                f"{path}: truncated or malformed: its header claims {length} bytes but the file has "
                f"{size}; get it again"
            )
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: a header of {length} bytes; at most {MAX_HEADER} are read")
        return parse_json(path, file.read(length)), length, size


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """Checks one entry of the header; `data` is where the tensors' bytes begin."""

    def malformed(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {quote(name)} {what}; the file is malformed, get it again")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise malformed("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or len(numbers) > 8 or not all(map(_is_size, numbers)):
            raise malformed(f"has {quote(str(numbers))} where whole numbers should be")
    if len(offsets) != 2:
        raise malformed(f"has {len(offsets)} data_offsets, not 2")
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{path}: tensor {quote(name)} has dtype {quote(str(dtype))}, which cannot be read; save it as "
            f"one of {', '.join(FLOAT_DTYPES)}"
        )
    nbytes = math.prod(shape) * FLOAT_DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise malformed(f"is {dtype} {shape}, {nbytes} bytes, but its data_offsets are {offsets}")
    return TensorInfo(tuple(shape), dtype, nbytes, path, data + offsets[0])


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a small file.

    Raises:
      CheckpointError: if it is missing, no JSON object, or has a key twice.
    """
    with open_file(path) as (file, size):
        if size > MAX_HEADER:
            raise CheckpointError(f"{path}: a JSON file of {size} bytes; at most {MAX_HEADER} are read")
        return parse_json(path, file.read())


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parses a JSON object in which no key may appear twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: {quote(twice)} appears twice; the file is malformed")
        return keys

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # no UTF-8 and endless numbers are ValueErrors too
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not valid JSON: {why}; get the file again") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(parsed).__name__} where an object should be")
    return parsed
