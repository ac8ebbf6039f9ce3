"""What every reader gives: a checkpoint open for reading, one tensor at a time."""

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

# The dtypes that every format spells alike; all are little-endian, as the formats prescribe.
FLOAT_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies and what it is.

    Attributes:
      shape: dimensions in C order, slowest first.
      dtype: the file's own name for the element type or quantisation, such as BF16 or Q4_1.
      nbytes: bytes in the file.
      file: the file that holds them.
      offset: their place in it, in bytes.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: Path
    offset: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose headers have been read and checked; no tensor data has.

    Attributes:
      format: the format's short name.
      path: what was opened.
      why: how the format was recognised, for people.
      config: the model it holds.
      tensors: the format's own names, in the file's order.
      decode: turns a tensor's bytes into an array of its shape.
      metadata: what else the headers say.
      home: the directory where the model's tokenizer is, if it is not in or beside `path`.
    """

    format: Format
    path: Path
    why: str
    config: LlamaConfig
    tensors: Mapping[str, TensorInfo]
    decode: Callable[[str, TensorInfo, np.ndarray], np.ndarray] = dataclasses.field(repr=False)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    home: Path | None = None

    def read(self, name: str) -> np.ndarray:
        """Reads one tensor: floats in their own dtype, quantised ones dequantised to f32.

        Raises:
          CheckpointError: if there is no such tensor, or its bytes can no longer be read.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: there is no tensor {quote(name)}")
        return self.decode(name, info, read_bytes(name, info))


def read_bytes(name: str, info: TensorInfo) -> np.ndarray:
    """Reads a tensor's bytes as uint8 [nbytes].

    Read, not memory-mapped: the peak stays at one tensor, and a file that another process cuts short
    is an error here instead of a fatal signal.
    """
    try:
        raw = np.fromfile(info.file, np.uint8, count=info.nbytes, offset=info.offset)
    except OSError as error:
        raise CheckpointError(f"{info.file}: cannot read tensor {quote(name)}: {reason(error)}") from error
    if raw.size != info.nbytes:
        raise CheckpointError(
            f"{info.file}: tensor {quote(name)} needs {info.nbytes} bytes at offset {info.offset} but only "
            f"{raw.size} are left; the file changed while it was read"
        )
    return raw


def decode_floats(name: str, info: TensorInfo, raw: np.ndarray) -> np.ndarray:
    """Views bytes as the plain floating-point tensor they are."""
    return raw.view(FLOAT_DTYPES[info.dtype]).reshape(info.shape)


def read_f32(name: str, info: TensorInfo) -> np.ndarray:
    """Reads a plain tensor of any floating-point type as f32."""
    return decode_floats(name, info, read_bytes(name, info)).astype(np.float32)


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file for reading, and says how many bytes it has.

    Raises:
      CheckpointError: if it is missing or no regular file, or cannot be read, here or in the block.
    """
    try:
        if not path.is_file():
            problem = "not a regular file" if path.exists() else "no such file"
            raise CheckpointError(f"{path}: {problem}; give the path of a checkpoint")
        with path.open("rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}; check its permissions") from error


def reason(error: OSError) -> str:
    """Returns an operating system error's words, on one line."""
    return error.strerror or type(error).__name__


def check_overlaps(path: Path, spans: Iterable[tuple[int, int, str]]) -> None:
    """Refuses tensors that share bytes of a file.

    Args:
      spans: (first byte, byte past the last, name) of each tensor.

    Raises:
      CheckpointError: naming the first two that overlap.
    """
    last_end, last_name = 0, ""
    for begin, end, name in sorted(spans):
        if begin < last_end:
            raise CheckpointError(
                f"{path}: tensors {quote(last_name)} and {quote(name)} overlap at byte {begin}; the file is "
                "malformed, get it again"
            )
        last_end, last_name = end, name


def quote(name: str) -> str:
    """Quotes a name that a file gave, for a one-line message: escaped, and at most about 80 characters."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


def brief(items: Iterable[str], limit: int = 20) -> str:
    """Joins items with commas for a one-line message, at most `limit` of them."""
    shown = list(items)
    rest = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {rest} more" if rest > 0 else "")
