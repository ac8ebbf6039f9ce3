"""`Source`, which every reader returns: an open checkpoint that is read one tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.weights.names import Format

Progress = Callable[[int, int, str], None]  # bytes done, bytes in total, and the tensor or file

# The dtype names that all formats share. Every format is little-endian.
FLOAT_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}
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


def read_bytes(name: str, info: TensorInfo) -> np.ndarray:
    """Reads a tensor's bytes as uint8 [nbytes].

    The file is read and not memory-mapped: peak host memory is one tensor, and a file that another process
    truncates raises an error here instead of SIGBUS.
    """
    try:
        raw = np.fromfile(info.file, np.uint8, count=info.nbytes, offset=info.offset)
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
    """Views raw bytes as an array of the tensor's floating-point dtype and shape."""
    return raw.view(FLOAT_DTYPES[info.dtype]).reshape(info.shape)


def read_f32(name: str, info: TensorInfo) -> np.ndarray:
    """Reads a tensor of any floating-point dtype as f32."""
    return decode_floats(name, info, read_bytes(name, info)).astype(np.float32)


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
            yield file, os.fstat(file.fileno()).st_size
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
