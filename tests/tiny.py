"""A model of a few kilobytes with random weights and a vocabulary, in the format of llama2.c."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from llama_jax.config import LlamaConfig

PIECES = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECES += [" ", *"abcdefghijklmnopqrstuvwxyz", " a", "ab"]
CONFIG = LlamaConfig(
    vocab_size=len(PIECES),
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    tie_word_embeddings=True,
)


def write_model(folder: Path, c: LlamaConfig = CONFIG) -> Path:
    """Writes `tiny.bin` and `tok.bin`, and returns the model's path."""
    rng = np.random.default_rng(0)
    width, kv = c.hidden_size, c.num_key_value_heads * c.head_dim
    sizes = (width, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads)
    header = struct.pack("<7i", *sizes, c.vocab_size, c.max_position_embeddings)
    layer_shapes = [(width,), (width, width), (kv, width), (kv, width), (width, width), (width,)]
    layer_shapes += [(c.intermediate_size, width), (width, c.intermediate_size), (c.intermediate_size, width)]
    shapes = [(c.vocab_size, width), *((c.num_hidden_layers, *shape) for shape in layer_shapes), (width,)]
    shapes += [(2, c.max_position_embeddings, c.head_dim // 2)]  # rotary tables, which readers skip
    path = folder / "tiny.bin"
    path.write_bytes(header + b"".join(rng.normal(size=shape).astype("<f4").tobytes() for shape in shapes))
    write_vocabulary(folder / "tok.bin", PIECES)
    return path


def write_vocabulary(path: Path, pieces: list[str]) -> None:
    """Writes a `tok*.bin` in which later pieces have lower scores."""
    data = struct.pack("<i", max(len(piece) for piece in pieces))
    for rank, piece in enumerate(pieces):
        data += struct.pack("<fi", -float(rank), len(piece.encode())) + piece.encode()
    path.write_bytes(data)
