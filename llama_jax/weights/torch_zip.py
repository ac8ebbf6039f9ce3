"""Reads where a torch checkpoint's tensors lie, and the tensors, without torch.

What `torch.save` writes is a zip archive: a pickle that describes the tensors, and an entry with the bytes of
each storage that they are views of (torch/serialization.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import CheckpointError
from llama_jax.weights.source import (
    FLOAT_DTYPES,
    TensorInfo,
    brief,
    decode_floats,
    open_file,
    quote,
    read_bytes,
)
from llama_jax.weights.torch_pickle import TensorView, read_torch_pickle
from llama_jax.weights.zip_directory import LOCAL_MAGIC, Entry, damaged, read_directory

_MAX_PICKLE = 64 << 20
_NESTED = ("model", "state_dict")  # where training programs put the weights
_BLOCK = 1 << 22  # elements read at a time of a tensor that lies scattered in its storage


@dataclasses.dataclass(frozen=True)
class StridedInfo(TensorInfo):
    """A tensor in a torch file.

    Attributes:
      strides: elements of the file from one index to the next, for each dimension.
    """

    strides: tuple[int, ...]


def read_torch_zip(path: Path) -> dict[str, StridedInfo]:
    """Reads and checks where a torch checkpoint's tensors lie.

    Raises:
      CheckpointError: if it is no zip of `torch.save`, is truncated or malformed, or holds anything but
        floating-point tensors by name (there, or under "model" or "state_dict").
    """
    with open_file(path) as (file, size):
        start = file.read(4)
        if start[:1] == b"\x80":
            raise CheckpointError(
                f"{path}: a PyTorch file from before version 1.6; load it in PyTorch and torch.save it anew"
            )
        if start != LOCAL_MAGIC:
            raise CheckpointError(f"{path}: not a file of torch.save; get it again")
        entries = read_directory(path, file, size)
        found = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(found) != 1:
            raise CheckpointError(f"{path}: a zip archive, but not one of torch.save; give a checkpoint")
        folder = found[0].removesuffix("data.pkl")
        if folder + "constants.pkl" in entries:
            raise CheckpointError(f"{path}: a TorchScript program; save the model's state_dict instead")
        order = entries.get(folder + "byteorder")
        if order is not None and (written := order.read(path, file, 16)) != b"little":
            raise CheckpointError(
                f"{path}: its byte order is {quote(written.decode('latin-1'))}, and only little can be read; "
                "save it on a little-endian machine"
            )
        value = read_torch_pickle(path, entries[found[0]].read(path, file, _MAX_PICKLE))
    tensors = {
        name: _place(path, name, view, entries.get(f"{folder}data/{view.storage.key}"))
        for name, view in _views(path, value).items()
    }
    # Views may share a storage, but a small file must not stand for any amount of memory and time.
    reach = sum(_span(info) * FLOAT_DTYPES[info.dtype].itemsize for info in tensors.values())
    if reach > 8 * size:
        raise CheckpointError(
            f"{path}: its tensors reach over {reach} bytes of a file of {size}: most are views of others; "
            "save copies instead"
        )
    return tensors


def part_of(info: StridedInfo, axis: int, begin: int, end: int) -> StridedInfo:
    """Returns the indices from `begin` to `end` of one dimension of a tensor."""
    shape = (*info.shape[:axis], end - begin, *info.shape[axis + 1 :])
    itemsize = FLOAT_DTYPES[info.dtype].itemsize
    return dataclasses.replace(
        info,
        shape=shape,
        nbytes=math.prod(shape) * itemsize,
        offset=info.offset + begin * info.strides[axis] * itemsize,
    )


def read_array(name: str, info: StridedInfo) -> np.ndarray:
    """Reads one tensor.

    Returns:
      `info.shape` in its own dtype, C-contiguous.

    Raises:
      CheckpointError: if its bytes can no longer be read.
    """
    if _is_contiguous(info):
        return decode_floats(name, info, read_bytes(name, info))
    out = np.empty(info.shape, FLOAT_DTYPES[info.dtype])
    _gather(name, info, out)
    return out


def _gather(name: str, info: StridedInfo, out: np.ndarray) -> None:
    """Reads a tensor that lies scattered, by halves until each is in one block of the storage."""
    itemsize, span = out.dtype.itemsize, _span(info)
    if span <= _BLOCK:
        raw = read_bytes(name, TensorInfo((span,), info.dtype, span * itemsize, info.file, info.offset))
        strides = [stride * itemsize for stride in info.strides]
        out[...] = np.lib.stride_tricks.as_strided(raw.view(out.dtype), info.shape, strides)
        return
    reaches = [(size - 1) * stride for size, stride in zip(info.shape, info.strides, strict=True)]
    axis = reaches.index(max(reaches))
    half = info.shape[axis] // 2
    for begin, end in ((0, half), (half, info.shape[axis])):
        place = (slice(None),) * axis + (slice(begin, end),)
        _gather(name, part_of(info, axis, begin, end), out[place])


def _is_contiguous(info: StridedInfo) -> bool:
    """Whether elements in C order lie side by side; the stride of a single index does not matter."""
    expected = 1
    for size, stride in zip(reversed(info.shape), reversed(info.strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _span(info: StridedInfo) -> int:
    """How many elements of the storage lie from a tensor's first to its last, both counted."""
    if 0 in info.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(info.shape, info.strides, strict=True))


def _views(path: Path, value: Any) -> Mapping[str, TensorView]:
    """Returns the tensors by name, out of what was saved."""
    if isinstance(value, dict):
        value = next((value[key] for key in _NESTED if isinstance(value.get(key), dict)), value)
    if not isinstance(value, dict) or not value:
        raise CheckpointError(
            f"{path}: holds no tensors by name but a {type(value).__name__}; save a state_dict"
        )
    others = [key for key, view in value.items() if type(key) is not str or type(view) is not TensorView]
    if others:
        raise CheckpointError(
            f"{path}: {brief((quote(str(key)) for key in others), 5)} in it is no tensor; save the model's "
            "state_dict alone"
        )
    return value


def _place(path: Path, name: str, view: TensorView, entry: Entry | None) -> StridedInfo:
    """Checks a tensor against the bytes of its storage."""
    storage = view.storage
    itemsize = FLOAT_DTYPES[storage.dtype].itemsize
    if entry is None or entry.size != storage.length * itemsize:
        found = "is not there" if entry is None else f"has {entry.size} bytes"
        raise damaged(
            path,
            f"tensor {quote(name)} is in storage {quote(storage.key)} of {storage.length} {storage.dtype}, "
            f"which {found}",
        )
    count = math.prod(view.shape)
    offset = entry.begin + view.offset * itemsize
    info = StridedInfo(view.shape, storage.dtype, count * itemsize, path, offset, view.strides)
    if any(size > 1 and stride == 0 for size, stride in zip(view.shape, view.strides, strict=True)):
        raise CheckpointError(
            f"{path}: tensor {quote(name)} is an expanded view; save a contiguous copy of it"
        )
    if view.offset + _span(info) > storage.length or count > _span(info):
        raise damaged(
            path,
            f"tensor {quote(name)} has shape {list(view.shape)} and strides {list(view.strides)} at element "
            f"{view.offset} of {storage.length}",
        )
    return info
