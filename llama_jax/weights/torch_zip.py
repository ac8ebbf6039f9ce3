"""Reads the tensors of a torch checkpoint, without torch.

`torch.save` writes a zip archive: a pickle that describes the tensors as strided views of storages, and one
entry with the bytes of each storage (torch/serialization.py).
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import CheckpointError
from llama_jax.weights.source import (
    FLOAT_DTYPES,
    TensorInfo,
    decode_floats,
    format_list,
    open_file,
    quote,
    read_bytes,
    slice_rows,
)
from llama_jax.weights.torch_pickle import TensorView, read_torch_pickle
from llama_jax.weights.zip_directory import LOCAL_MAGIC, Entry, archive_error, read_directory

_MAX_PICKLE = 64 << 20
_STATE_DICT_KEYS = ("model", "state_dict")  # keys under which training programs nest the weights
_BLOCK = 1 << 22  # elements read at a time of a non-contiguous tensor


@dataclasses.dataclass(frozen=True)
class StridedInfo(TensorInfo):
    """A tensor in a torch file.

    Attributes:
      strides: step between consecutive indices of each dimension, in elements.
      crc: CRC-32 of its bytes; 0 for a part of a storage, and where the archive has none.
    """

    strides: tuple[int, ...]
    crc: int = 0


def read_torch_zip(path: Path) -> dict[str, StridedInfo]:
    """Reads and checks the shapes, dtypes, strides and offsets of a torch checkpoint's tensors.

    Raises:
      CheckpointError: if the file is not a `torch.save` zip, is truncated or malformed, or holds anything but
        named floating-point tensors (at the top level, or under "model" or "state_dict").
    """
    with open_file(path) as (file, size):
        start = file.read(4)
        if start[:1] == b"\x80":
            raise CheckpointError(
                f"{path}: a PyTorch file older than version 1.6; load it in PyTorch and torch.save it again"
            )
        if start != LOCAL_MAGIC:
            raise CheckpointError(f"{path}: not a torch.save file; download it again")
        entries = read_directory(path, file, size)
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointError(f"{path}: a zip archive that torch.save did not write; give a checkpoint")
        folder = pickles[0].removesuffix("data.pkl")
        if folder + "constants.pkl" in entries:
            raise CheckpointError(f"{path}: a TorchScript program; save the model's state_dict instead")
        byteorder = entries.get(folder + "byteorder")
        if byteorder is not None and (order := byteorder.read(path, file, 16)) != b"little":
            raise CheckpointError(
                f"{path}: its byte order is {quote(order.decode('latin-1'))}, and only little is supported; "
                "save it on a little-endian machine"
            )
        value = read_torch_pickle(path, entries[pickles[0]].read(path, file, _MAX_PICKLE))
    tensors = {
        name: _locate(path, name, view, entries.get(f"{folder}data/{view.storage.key}"))
        for name, view in _tensor_views(path, value).items()
    }
    # Views may share a storage, but a small file must not cause unbounded memory use and work.
    extent = sum(_span(info) * FLOAT_DTYPES[info.dtype].itemsize for info in tensors.values())
    if extent > 8 * size:
        raise CheckpointError(
            f"{path}: its tensors span {extent} bytes in a file of {size} bytes: most are views of others; "
            "save copies instead"
        )
    return tensors


def slice_dimension(info: StridedInfo, axis: int, begin: int, end: int) -> StridedInfo:
    """Returns the slice `begin:end` along one dimension of a tensor."""
    shape = (*info.shape[:axis], end - begin, *info.shape[axis + 1 :])
    itemsize = FLOAT_DTYPES[info.dtype].itemsize
    return dataclasses.replace(
        info,
        shape=shape,
        nbytes=math.prod(shape) * itemsize,
        offset=info.offset + begin * info.strides[axis] * itemsize,
        crc=0,
    )


def read_array(name: str, info: StridedInfo) -> np.ndarray:
    """Reads one tensor.

    Returns:
      `info.shape` in its own dtype, C-contiguous.

    Raises:
      CheckpointError: if its bytes can no longer be read, or their checksum does not match, which torch does
        not compare.
    """
    if _is_contiguous(info):
        raw = read_bytes(name, info)
        if info.crc and zlib.crc32(raw.data) != info.crc:
            raise archive_error(info.file, f"the checksum of tensor {quote(name)} does not match")
        return decode_floats(name, info, raw)
    out = np.empty(info.shape, FLOAT_DTYPES[info.dtype])
    _read_strided(name, info, out)
    return out


def read_tensor(name: str, info: TensorInfo) -> np.ndarray:
    """Reads one floating-point tensor of a torch or safetensors file, in its own dtype.

    Raises:
      CheckpointError: if its bytes can no longer be read.
    """
    if isinstance(info, StridedInfo):
        return read_array(name, info)
    return decode_floats(name, info, read_bytes(name, info))


def read_rows(name: str, info: TensorInfo, begin: int, end: int) -> np.ndarray:
    """Reads rows of one floating-point tensor of a torch or safetensors file, in its own dtype.

    Raises:
      CheckpointError: if its bytes can no longer be read.
    """
    if isinstance(info, StridedInfo):
        return read_array(name, slice_dimension(info, 0, begin, end))
    return read_tensor(name, slice_rows(info, begin, end))


def _read_strided(name: str, info: StridedInfo, out: np.ndarray) -> None:
    """Reads a non-contiguous tensor, halving it until its span fits in one block."""
    itemsize, span = out.dtype.itemsize, _span(info)
    if span <= _BLOCK:
        raw = read_bytes(name, TensorInfo((span,), info.dtype, span * itemsize, info.file, info.offset))
        strides = [stride * itemsize for stride in info.strides]
        out[...] = np.lib.stride_tricks.as_strided(raw.view(out.dtype), info.shape, strides)
        return
    spans = [(size - 1) * stride for size, stride in zip(info.shape, info.strides, strict=True)]
    axis = spans.index(max(spans))
    half = info.shape[axis] // 2
    for begin, end in ((0, half), (half, info.shape[axis])):
        index = (slice(None),) * axis + (slice(begin, end),)
        _read_strided(name, slice_dimension(info, axis, begin, end), out[index])


def _is_contiguous(info: StridedInfo) -> bool:
    """Whether the tensor is C-contiguous; strides of dimensions of size 1 are ignored."""
    expected = 1
    for size, stride in zip(reversed(info.shape), reversed(info.strides), strict=True):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _span(info: StridedInfo) -> int:
    """Returns the number of storage elements from a tensor's first to its last element, inclusive."""
    if 0 in info.shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(info.shape, info.strides, strict=True))


def _tensor_views(path: Path, value: Any) -> Mapping[str, TensorView]:
    """Returns the tensors by name from the unpickled object."""
    if isinstance(value, dict):
        value = next((value[key] for key in _STATE_DICT_KEYS if isinstance(value.get(key), dict)), value)
    if not isinstance(value, dict) or not value:
        raise CheckpointError(
            f"{path}: holds a {type(value).__name__} without named tensors; save a state_dict"
        )
    others = [key for key, view in value.items() if type(key) is not str or type(view) is not TensorView]
    if others:
        names = format_list((quote(str(key)) for key in others), 5)
        raise CheckpointError(f"{path}: not a tensor: {names}; save only the model's state_dict")
    return value


def _locate(path: Path, name: str, view: TensorView, entry: Entry | None) -> StridedInfo:
    """Checks a tensor view against its storage, and returns its location in the file."""
    storage = view.storage
    itemsize = FLOAT_DTYPES[storage.dtype].itemsize
    if entry is None or entry.size != storage.length * itemsize:
        problem = "is missing" if entry is None else f"has {entry.size} bytes"
        raise archive_error(
            path,
            f"tensor {quote(name)} is in storage {quote(storage.key)} of {storage.length} {storage.dtype}, "
            f"which {problem}",
        )
    count = math.prod(view.shape)
    offset = entry.begin + view.offset * itemsize
    crc = entry.crc if count == storage.length else 0
    info = StridedInfo(view.shape, storage.dtype, count * itemsize, path, offset, view.strides, crc)
    if any(size > 1 and stride == 0 for size, stride in zip(view.shape, view.strides, strict=True)):
        raise CheckpointError(
            f"{path}: tensor {quote(name)} is an expanded view; save a contiguous copy of it"
        )
    if view.offset + _span(info) > storage.length or count > _span(info):
        raise archive_error(
            path,
            f"tensor {quote(name)} has shape {list(view.shape)} and strides {list(view.strides)} at element "
            f"{view.offset} of {storage.length}",
        )
    return info
