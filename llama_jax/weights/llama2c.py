"""Reads llama2.c's `.bin` files: versions 0 (no magic number), 1 (f32) and 2 (int8, quantized in groups).

The files have no tensor names: the layout follows from the header, as in karpathy/llama2.c's export.py (the
writer) and run.c and runq.c (the readers).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.weights.names import LEAVES
from llama_jax.weights.source import Source, TensorInfo, decode_floats, open_file, quote, read_bytes

MAGIC = b"24ka"  # "ak42" as a little-endian integer
HEADER_BYTES = 256  # since version 1
_HEADER_V0_BYTES = 7 * 4

_NORMS = ("rms_att_weight", "rms_ffn_weight", "rms_final_weight")
_MATRICES = ("token_embedding_table", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "wcls")
ROTARY_TABLES = ("freq_cis_real", "freq_cis_imag")
_ORDER_V0 = (
    *("token_embedding_table", "rms_att_weight", "wq", "wk", "wv", "wo", "rms_ffn_weight"),
    *("w1", "w2", "w3", "rms_final_weight", *ROTARY_TABLES, "wcls"),
)
INT8 = "INT8"


def is_llama2c(path: Path) -> bool:
    """Whether a file begins like a llama2.c model: with the magic number, or with seven plausible sizes."""
    with open_file(path) as (file, _):
        start = file.read(_HEADER_V0_BYTES)
    if start[:4] == MAGIC:
        return True
    if len(start) < _HEADER_V0_BYTES:
        return False
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", start)
    return all(0 < size < 1 << 24 for size in (dim, hidden, layers, heads, kv_heads, abs(vocab), context))


def open_llama2c(path: Path, detected_by: str) -> Source:
    """Opens a llama2.c model file.

    Raises:
      CheckpointError: if the version is unknown, or the file size does not match the header.
    """
    with open_file(path) as (file, size):
        header = file.read(HEADER_BYTES)
    version, offset, group = 0, _HEADER_V0_BYTES, 1
    if header[:4] == MAGIC and len(header) == HEADER_BYTES:
        version, offset = int.from_bytes(header[4:8], "little"), HEADER_BYTES
        if version not in (1, 2):
            raise CheckpointError(f"{path}: llama2.c version {version} is not supported; only 0, 1 and 2")
        sizes, tied = header[8:36], header[36] != 0
        group = int.from_bytes(header[37:41], "little") if version == 2 else 1
    elif len(header) >= _HEADER_V0_BYTES and header[:4] != MAGIC:
        sizes, tied = header[:_HEADER_V0_BYTES], struct.unpack_from("<i", header, 20)[0] > 0
    else:
        raise CheckpointError(
            f"{path}: {size} bytes are too few for a llama2.c header; download the file again"
        )
    config = _config(path, sizes, tied)
    if group < 1 or config.hidden_size % group:
        raise CheckpointError(f"{path}: group size {group} does not divide hidden_size {config.hidden_size}")
    layout = list(blocks(config, version, group))
    expected = offset + sum(block.copies * block.nbytes for block in layout)
    if size != expected:
        raise CheckpointError(
            f"{path}: has {size} bytes but its header requires {expected}: the file is truncated, or not a "
            "llama2.c model; download it again"
        )
    tensors = {}
    for block in layout:
        for layer in range(block.copies):
            name = block.name.format(layer=layer)
            tensors[name] = TensorInfo(block.shape, block.dtype, block.nbytes, path, offset)
            offset += block.nbytes
    decode = functools.partial(_decode, group=group)
    return Llama2cSource(
        "llama2c", path, detected_by, config, tensors, decode, {"version": version, "group": group}
    )


class Llama2cSource(Source):
    """A llama2.c model."""

    def read_rows(self, name: str, begin: int, end: int) -> np.ndarray:
        """Reads some rows of one tensor; of a quantized one their values, and their scales behind all values.

        Raises:
          CheckpointError: as `read`.
        """
        info = self.tensors.get(name)
        if info is None or info.dtype != INT8:
            return super().read_rows(name, begin, end)
        (height, width), group = info.shape, self.metadata["group"]
        # Groups may straddle rows of the matrices whose width is intermediate_size.
        first, last = begin * width // group, -(-end * width // group)
        values = _part(info, first * group, (last - first) * group)
        scales = _part(info, height * width + 4 * first, 4 * (last - first))
        raw = np.concatenate([read_bytes(name, values), read_bytes(name, scales)])
        flat = dataclasses.replace(info, shape=((last - first) * group,))
        start = begin * width - first * group
        found = self.decode(name, flat, raw)[start : start + (end - begin) * width]
        return found.reshape(end - begin, width)


def _part(info: TensorInfo, start: int, nbytes: int) -> TensorInfo:
    """Some bytes of a tensor."""
    return dataclasses.replace(info, nbytes=nbytes, offset=info.offset + start)


def _config(path: Path, sizes: bytes, tied: bool) -> LlamaConfig:
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", sizes)
    try:
        # The format does not store eps and theta: llama2.c's programs hard-code these values.
        return LlamaConfig(
            vocab_size=abs(vocab),
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=context,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            tie_word_embeddings=tied,
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: not a llama2.c model, or a damaged one: {error}") from error


class Block(NamedTuple):
    """Consecutive tensors of the same shape: one per layer (`copies`), or one outside the layers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    copies: int


def blocks(config: LlamaConfig, version: int, group: int) -> Iterator[Block]:
    """Yields the contents of the file in order; `group` is the quantization group size of version 2."""
    leaves = {leaf.llama2c.removesuffix("[{layer}]"): leaf for leaf in LEAVES}
    for name in _ORDER_V0 if version == 0 else (*_NORMS, *_MATRICES):
        if name in ROTARY_TABLES:
            positions, pairs = config.max_position_embeddings, config.head_dim // 2
            yield Block(name, (positions, pairs), "F32", 4 * positions * pairs, 1)
        elif name != "wcls" or not config.tie_word_embeddings:
            leaf = leaves[name]
            shape = leaf.stored_shape(config, "llama2c")
            copies, values = config.num_hidden_layers if leaf.per_layer else 1, math.prod(shape)
            if version == 2 and name in _MATRICES:
                yield Block(leaf.llama2c, shape, INT8, values + 4 * (values // group), copies)
            else:
                yield Block(leaf.llama2c, shape, "F32", 4 * values, copies)


def _decode(name: str, info: TensorInfo, raw: np.ndarray, *, group: int) -> np.ndarray:
    """Decodes a tensor's bytes to f32: plain floats, or int8 values followed by one f32 scale per group."""
    if info.dtype != INT8:
        return decode_floats(name, info, raw)
    count = math.prod(info.shape)
    values, scales = raw[:count].view(np.int8), raw[count:].view("<f4")
    # An early export.py stored all scales at the end of the file, under the same version number.
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise CheckpointError(
            f"{info.file}: tensor {quote(name)} has negative or non-finite scales; the file is damaged, or "
            "written by an early export.py: export it again"
        )
    return (values.reshape(-1, group) * scales[:, None]).reshape(info.shape)
