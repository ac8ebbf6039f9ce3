"""The shapes that `benchmarks.gpu` measures; plain numbers, which its torch side gets as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

PROMPT, NEW_TOKENS = 18, 110  # 128 positions, so that all measurements of a batch size share two programs
PREFILL = 100
DECODE_BATCHES = (1, 8, 64)
TRAIN = {"warm_up": 3, "measured": 10}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model, and the batch of its training step; the batch is halved while memory does not suffice."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    batch: int
    seq_len: int = 4096
    lora_rank: int = 16

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_SHAPES = {
    # TinyLlama's, Llama 3.2 3B's with Llama 2's vocabulary, and Llama 2 7B's.
    "1b": Shape(32000, 2048, 5632, 22, 32, 4, batch=8),
    "3b": Shape(32000, 3072, 8192, 28, 24, 8, batch=2),
    "7b": Shape(32000, 4096, 11008, 32, 32, 32, batch=4),
}
_TINY = Shape(128, 64, 96, 2, 4, 2, batch=2, seq_len=128, lora_rank=2)


def shapes(tiny: bool) -> dict[str, Shape]:
    """The shapes by name; all tiny ones are the same."""
    return dict.fromkeys(_SHAPES, _TINY) if tiny else _SHAPES
