"""Plans a llama2.c model: `model.bin` for run.c or runq.c, with `tokenizer.bin` beside it.

Layout: karpathy/llama2.c, export.py; see `weights.llama2c`.
"""

from __future__ import annotations

import functools
import struct

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError
from llama_jax.weights.llama2c import HEADER_BYTES, INT8, MAGIC, ROTARY_TABLES, blocks
from llama_jax.weights.names import Leaf, entries
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast
from llama_jax.weights.write.plan import Blob, Plan, Region
from llama_jax.weights.write.vocabulary import Vocabulary

_FILE = "model.bin"
_F32 = np.dtype("<f4")
_GROUP_SIZE = 64  # values per scale in version 2
_CHUNK = 1 << 20  # values quantized at a time


def plan_llama2c(tensors: Tensors, vocabulary: Vocabulary, *, version: int = 0) -> Plan:
    """Plans a directory with a llama2.c model and its tokenizer.

    Args:
      tensors: the tensors to write.
      vocabulary: the tokenizer, whose files are included.
      version: 0 is f32 without a magic number, for run.c; 1 is f32 with one; 2 is int8, for runq.c, with a
        scale per group of 64 values, or a smaller group that divides the matrices' rows.

    Raises:
      ConfigError: for a model that llama2.c's programs compute differently.
    """
    config = tensors.config
    _check_representable(config)
    group_size = _group_size(config) if version == 2 else 1
    header = _header(config, version, group_size)
    blobs, regions, offset = [Blob(_FILE, 0, header)], [], len(header)
    entry_by_name = {entry.name: entry for entry in entries(config, "llama2c")}
    for block in blocks(config, version, group_size):
        if block.name in ROTARY_TABLES:
            table = np.cos if block.name.endswith("real") else np.sin
            blobs.append(Blob(_FILE, offset, table(_angles(config)).astype(_F32).tobytes()))
            offset += block.nbytes
            continue
        for layer in range(block.copies):
            entry = entry_by_name[block.name.format(layer=layer)]
            int8_group = group_size if block.dtype == INT8 else None
            encode = functools.partial(_encode, leaf=entry.leaf, config=config, group_size=int8_group)
            regions.append(Region(_FILE, offset, block.nbytes, entry.leaf, entry.layer, encode))
            offset += block.nbytes
    return Plan("llama2c", False, {_FILE: offset}, blobs, vocabulary.files, regions)


def _check_representable(config: LlamaConfig) -> None:
    """Checks the settings that are constants in llama2.c's programs."""
    scaling = config.rope_scaling
    constants = {
        "rms_norm_eps": (config.rms_norm_eps, 1e-5),
        "rope_theta": (config.rope_theta, 1e4),
        "rope_scaling": (scaling and scaling.kind, None),
        "head_dim": (config.head_dim, config.hidden_size / config.num_attention_heads),
    }
    for name, (value, expected) in constants.items():
        if value != expected:
            constant = "none" if expected is None else f"{expected:g}"
            raise ConfigError(
                f"{name} is {value}; llama2.c's programs run every model with {constant}, so its format "
                "cannot represent this model; use another format"
            )


def _group_size(config: LlamaConfig) -> int:
    """The largest group size, up to 64, that divides D and F: runq.c quantizes activations in groups, too."""
    group_size = _GROUP_SIZE
    while config.hidden_size % group_size or config.intermediate_size % group_size:
        group_size //= 2
    return group_size


def _header(config: LlamaConfig, version: int, group_size: int) -> bytes:
    tied = config.tie_word_embeddings
    sizes = struct.pack(
        "<7i",
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        -config.vocab_size if version == 0 and not tied else config.vocab_size,
        config.max_position_embeddings,
    )
    if version == 0:
        return sizes
    header = MAGIC + struct.pack("<i", version) + sizes + struct.pack("<?", tied)
    if version == 2:
        header += struct.pack("<i", group_size)
    return header.ljust(HEADER_BYTES, b"\0")


def _angles(config: LlamaConfig) -> np.ndarray:
    """The rotary angles of every position, [T, H/2], in f32 precision as in export.py.

    Version 0 contains their cosines and sines, which its programs skip.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=_F32) / np.float32(config.head_dim)
    frequencies = 1 / np.float32(config.rope_theta) ** exponents
    angles = np.outer(np.arange(config.max_position_embeddings, dtype=_F32), frequencies)
    return angles.astype(np.float64)


def _encode(array: np.ndarray, *, leaf: Leaf, config: LlamaConfig, group_size: int | None) -> np.ndarray:
    """Encodes a tensor given in Hugging Face's layout and any float dtype; int8 if there is a group size."""
    array = leaf.convert_layout(array, config, "hf", "llama2c")
    if group_size is None:
        return cast(array, _F32)
    rows = array.reshape(-1, group_size)
    out = np.empty(array.size + 4 * len(rows), np.uint8)
    values, scales = out[: array.size].view(np.int8).reshape(rows.shape), out[array.size :].view(_F32)
    step = max(_CHUNK // group_size, 1)
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step].astype(_F32)
        scale = np.abs(chunk).max(axis=1) / np.float32(127)
        scales[start : start + step] = scale
        # The scale of an all-zero group is 0.
        chunk /= np.where(scale == 0, 1, scale)[:, None]
        values[start : start + step] = np.rint(chunk)
    return out
