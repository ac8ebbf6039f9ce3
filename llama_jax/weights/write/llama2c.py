"""Plans a llama2.c model: `model.bin`, which run.c or runq.c reads, with `tokenizer.bin` beside it.

Layout: karpathy/llama2.c, export.py; `weights.llama2c` has it.
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
from llama_jax.weights.write.plan import Piece, Plan, Region
from llama_jax.weights.write.vocabulary import Vocabulary

_FILE = "model.bin"
_F32 = np.dtype("<f4")
_GROUP = 64  # values that share a scale in version 2
_CHUNK = 1 << 20  # values quantised at once


def plan_llama2c(tensors: Tensors, vocabulary: Vocabulary, *, version: int = 0) -> Plan:
    """Plans a directory with a llama2.c model and its vocabulary.

    Args:
      tensors: what to write.
      vocabulary: its files are put beside.
      version: 0 is f32 without a magic number, which run.c reads; 1 is f32 with one; 2, which runq.c
        reads, is int8 with a scale for every 64 values, or fewer where 64 does not divide a matrix's rows.

    Raises:
      ConfigError: for a model that llama2.c's programs would run differently.
    """
    config = tensors.config
    _check(config)
    group = _group(config) if version == 2 else 1
    header = _header(config, version, group)
    pieces, regions, offset = [Piece(_FILE, 0, header)], [], len(header)
    stored = {entry.name: entry for entry in entries(config, "llama2c")}
    for block in blocks(config, version, group):
        if block.name in ROTARY_TABLES:
            table = np.cos if block.name.endswith("real") else np.sin
            pieces.append(Piece(_FILE, offset, table(_angles(config)).astype(_F32).tobytes()))
            offset += block.nbytes
            continue
        for layer in range(block.copies):
            entry = stored[block.name.format(layer=layer)]
            int8 = group if block.dtype == INT8 else None
            encode = functools.partial(_encode, leaf=entry.leaf, config=config, group=int8)
            regions.append(Region(_FILE, offset, block.nbytes, entry.leaf, entry.layer, encode))
            offset += block.nbytes
    return Plan("llama2c", False, {_FILE: offset}, pieces, vocabulary.files, regions)


def _check(config: LlamaConfig) -> None:
    """Refuses what the format has no place for: its programs have these built in."""
    scaling = config.rope_scaling
    built_in = {
        "rms_norm_eps": (config.rms_norm_eps, 1e-5),
        "rope_theta": (config.rope_theta, 1e4),
        "rope_scaling": (scaling and scaling.kind, None),
        "head_dim": (config.head_dim, config.hidden_size / config.num_attention_heads),
    }
    for name, (value, expected) in built_in.items():
        if value != expected:
            shown = "none" if expected is None else f"{expected:g}"
            raise ConfigError(
                f"{name} is {value}; llama2.c's programs run every model with {shown}, so that its files "
                "cannot hold this one: write another format"
            )


def _group(config: LlamaConfig) -> int:
    """The most values, up to 64, that divide what runq.c takes apart in groups: activations of D and F."""
    group = _GROUP
    while config.hidden_size % group or config.intermediate_size % group:
        group //= 2
    return group


def _header(config: LlamaConfig, version: int, group: int) -> bytes:
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
        header += struct.pack("<i", group)
    return header.ljust(HEADER_BYTES, b"\0")


def _angles(config: LlamaConfig) -> np.ndarray:
    """The rotary angles of every position, [T, H/2], to f32 precision as export.py has them.

    Version 0 carries their cosines and sines, and its programs pass over them.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=_F32) / np.float32(config.head_dim)
    frequencies = 1 / np.float32(config.rope_theta) ** exponents
    angles = np.outer(np.arange(config.max_position_embeddings, dtype=_F32), frequencies)
    return angles.astype(np.float64)


def _encode(array: np.ndarray, *, leaf: Leaf, config: LlamaConfig, group: int | None) -> np.ndarray:
    """A tensor's bytes, from Hugging Face's layout in any float dtype; int8 in groups if one is given."""
    array = leaf.reordered(array, config, "hf", "llama2c")
    if group is None:
        return cast(array, _F32)
    rows = array.reshape(-1, group)
    out = np.empty(array.size + 4 * len(rows), np.uint8)
    values, scales = out[: array.size].view(np.int8).reshape(rows.shape), out[array.size :].view(_F32)
    step = max(_CHUNK // group, 1)
    for start in range(0, len(rows), step):
        part = rows[start : start + step].astype(_F32)
        scale = np.abs(part).max(axis=1) / np.float32(127)
        scales[start : start + step] = scale
        # A group of zeros has no scale to divide by, and is zeros.
        part /= np.where(scale == 0, 1, scale)[:, None]
        values[start : start + step] = np.rint(part)
    return out
