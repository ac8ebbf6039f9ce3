"""GGUF models that are split over several files, as llama.cpp's gguf-split writes them.

The parts are named NAME-00001-of-00003.gguf and so on. The first has the metadata of the model; every part
has its own tensors, and `split.no` and `split.count`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import CheckpointError
from llama_jax.storage import as_path
from llama_jax.weights.gguf_header import Header, read_header
from llama_jax.weights.source import format_list, quote

_NAME = re.compile(r"(?P<model>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_MAX_PARTS = 10_000
_REMEDY = "take all parts from the same model"


def first_part(path: Path) -> Path:
    """Returns the first part of the model that `path` is a part of: `path` itself if it is no later part."""
    match = _NAME.fullmatch(path.name)
    if match is None or int(match["number"]) <= 1:
        return path
    return path.with_name(f"{match['model']}-00001-of-{match['count']}.gguf")


def read_gguf_metadata(path: str | Path) -> Mapping[str, Any]:
    """Reads only the metadata fields of a GGUF file, or of the model that it is a part of.

    Returns:
      A mapping of keys to str, bool, int, float (f32 values as the shortest decimal that round-trips), list
      of str, or one-dimensional NumPy array.

    Raises:
      CheckpointError: if the file is missing, truncated or malformed.
    """
    path = as_path(path)
    first = first_part(path)
    return read_header(first if first.exists() else path, with_tensors=False).metadata


def read_gguf_header(path: str | Path) -> Header:
    """Reads and checks the metadata and the tensor table of a GGUF model, whichever part is given.

    Raises:
      CheckpointError: if a file is missing, truncated or malformed, a tensor has an unsupported type, or the
        parts are not those of one model.
    """
    path = as_path(path)
    first = first_part(path)
    if not first.exists() and first != path:
        raise CheckpointError(f"{path}: is a part of a model whose first, {first.name}, is missing; add it")
    header = read_header(first)
    count = _number(first, header, "split.count", 1)
    if count <= 1:
        return header
    tensors = dict(header.tensors)
    for number, part in enumerate(_parts(first, count)):
        other = header if number == 0 else read_header(part)
        described = _number(part, other, "split.no", -1), _number(part, other, "split.count", -1)
        if described != (number, count):
            raise CheckpointError(
                f"{part}: says that it is part {described[0] + 1} of {described[1]}, not {number + 1} of "
                f"{count}; {_REMEDY}"
            )
        if number and (double := sorted(tensors.keys() & other.tensors.keys())):
            raise CheckpointError(
                f"{part}: repeats tensors of another part: {format_list(map(quote, double), 5)}; {_REMEDY}"
            )
        tensors |= other.tensors
    expected = _number(first, header, "split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(
            f"{first}: its {count} parts have {len(tensors)} tensors, not {expected}; {_REMEDY}"
        )
    return Header(header.metadata, tensors)


def _parts(first: Path, count: int) -> list[Path]:
    match = _NAME.fullmatch(first.name)
    if match is None or int(match["count"]) != count or count > _MAX_PARTS:
        raise CheckpointError(
            f"{first}: is one of {count} parts, which are found by their names; name them "
            f"NAME-00001-of-{count:05}.gguf and so on, as they were"
        )
    parts = [
        first.with_name(f"{match['model']}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)
    ]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise CheckpointError(f"{first.parent}: parts are missing: {format_list(missing, 5)}; add them")
    return parts


def _number(path: Path, header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if type(value) is not int:
        raise CheckpointError(f"{path}: metadata field {key} is {quote(str(value))}; it must be a number")
    return value
