"""`Source`, which every reader returns: an open checkpoint that is read one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.storage import read_range
from llama_jax.weights.names import Format

Progress = Callable[[int, int, str], None]  # bytes done, bytes in total, and the tensor or file

# The dtype names that all formats share. Every format is little-endian.
FLOAT_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}
# The other dtypes of safetensors files: of the parts of quantized matrices, and of what is not a parameter.
PART_DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
}
FLOAT8 = ("F8_E4M3", "F8_E5M2")
DTYPE_NAMES: Mapping[np.dtype[Any], str] = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """The shape, dtype and file location of one tensor.

    Attributes:
      shape: dimensions in C order, slowest first.
      dtype: the file's own name of the element type or quantization, such as BF16 or Q4_1.
      nbytes: size in the file, in bytes.
      file: the file that stores the tensor.
      offset: position in the file, in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    offset: int


@dataclasses.dataclass(frozen=True)
class Source:
    """An open checkpoint. Its headers are read and checked; no tensor data is read yet.

    Attributes:
      format: short name of the format.
      path: the path that was opened.
      detected_by: how the format was detected, as a readable phrase.
      config: the model configuration.
      tensors: tensors by the format's own names, in file order.
      decode: converts a tensor's raw bytes to an array of its shape.
      metadata: other header fields.
      tokenizer_dir: the directory of the model's tokenizer, if it is not in or beside `path`.
    """

    format: Format
    path: Path
    detected_by: str
    config: LlamaConfig
    tensors: Mapping[str, TensorInfo]
    decode: Callable[[str, TensorInfo, np.ndarray], np.ndarray] = dataclasses.field(repr=False)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    tokenizer_dir: Path | None = None

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor: floats in their own dtype, quantized types dequantized to f32.

        Raises:
          CheckpointError: if there is no such tensor, or its bytes can no longer be read.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: there is no tensor {quote(name)}")
        return self.decode(name, info, read_bytes(name, info))

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Reads the rows `begin` to `end` (exclusive) of one tensor, and no other bytes if it can.

        Raises:
          CheckpointError: as `read`.
        """
        info = self.tensors.get(name)
        if info is None or info.nbytes % info.shape[0]:
            return self.read(name)[begin:end]
        part = slice_rows(info, begin, end)
        return self.decode(name, part, read_bytes(name, part))


def slice_rows(info: TensorInfo, begin: int, end: int) -> TensorInfo:
    """Returns the location of some rows of a contiguous tensor."""
    row = info.nbytes // info.shape[0]
    return dataclasses.replace(
        info,
        shape=(end - begin, *info.shape[1:]),
        nbytes=(end - begin) * row,
        offset=info.offset + begin * row,
    )


def read_bytes(name: str, info: TensorInfo) -> np.ndarray:
    """Reads a tensor's bytes as uint8 [nbytes].

    Peak host memory is one tensor.

    Raises:
      CheckpointError: if the file cannot be read, or has become shorter.
    """
    try:
        raw = read_range(info.file, info.offset, info.nbytes)
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: cannot read tensor {quote(name)}: {os_error_reason(error)}"
        ) from error
    if raw.size != info.nbytes:
        raise CheckpointError(
            f"{info.file}: tensor {quote(name)} needs {info.nbytes} bytes at offset {info.offset} but only "
            f"{raw.size} are left; the file changed while it was read"
        )
    return raw


def decode_floats(name: str, info: TensorInfo, raw: np.ndarray) -> np.ndarray:
    """Views raw bytes as an array of the tensor's floating-point dtype and shape; f32 for 8-bit floats.

    Raises:
      CheckpointError: if the tensor holds integers.
    """
    if info.dtype in FLOAT_DTYPES:
        return raw.view(FLOAT_DTYPES[info.dtype]).reshape(info.shape)
    if info.dtype in FLOAT8:
        return raw.view(PART_DTYPES[info.dtype]).reshape(info.shape).astype(np.float32)
    raise CheckpointError(
        f"{info.file}: tensor {quote(name)} has dtype {quote(info.dtype)}, which no parameter has; save it "
        f"as one of {', '.join(FLOAT_DTYPES)}"
    )


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file for reading; yields the file and its size in bytes.

    Raises:
      CheckpointError: if the file is missing or not a regular file, or if reading it fails, here or in the
        `with` block.
    """
    try:
        if not path.is_file():
            problem = "not a regular file" if path.exists() else "no such file"
            raise CheckpointError(f"{path}: {problem}; give the path of a checkpoint")
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            yield file, size
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {os_error_reason(error)}; check its permissions"
        ) from error


def os_error_reason(error: OSError) -> str:
    """Returns the operating system's error message, without path and errno."""
    return error.strerror or type(error).__name__


def check_overlaps(path: Path, spans: Iterable[tuple[int, int, str]]) -> None:
    """Checks that no two tensors of a file overlap.

    Args:
      path: the file, for the error message.
      spans: (first byte, end byte (exclusive), name) of each tensor.

    Raises:
      CheckpointError: naming the first two tensors that overlap.
    """
    last_end, last_name = 0, ""
    for begin, end, name in sorted(spans):
        if begin < last_end:
            raise CheckpointError(
                f"{path}: tensors {quote(last_name)} and {quote(name)} overlap at byte {begin}; the file is "
                "malformed, download it again"
            )
        last_end, last_name = end, name


def quote(name: str) -> str:
    """Quotes a string from a file for a one-line message: escaped, and truncated to about 80 characters."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def format_list(items: Iterable[str], limit: int = 20) -> str:
    """Joins at most `limit` items with commas for a one-line message, and counts the rest."""
    shown = list(items)
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")
