"""The small model behind the Meta goldens, and Meta's parts of any model, by numpy alone.

What is split how is written from Meta's model.py and fairscale's layers: a part of a ColumnParallelLinear has
rows of its [out, in], of a RowParallelLinear columns, of a ParallelEmbedding (Llama 2) columns, and of a
VocabParallelEmbedding (Llama 3) rows; everything else is whole in each part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from tests.weights.writers import projections

FOLDER = Path(__file__).parent
LLAMA2 = LlamaConfig(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=8,
)
LLAMA3 = LLAMA2.replace(
    rope_theta=500_000.0,
    rope_scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0),
    max_position_embeddings=131_072,
)
CONFIGS = {1: LLAMA2, 2: LLAMA2, 8: LLAMA3}
DTYPES = {1: "float16", 2: "bfloat16", 8: "bfloat16"}

_PARAMS = {"dim": 32, "multiple_of": 16, "ffn_dim_multiplier": 0.15, "n_heads": 16, "n_kv_heads": 8} | {
    "n_layers": 1,
    "norm_eps": 1e-05,
}
PARAMS: dict[int, dict[str, Any]] = {
    1: _PARAMS | {"vocab_size": -1},
    2: _PARAMS | {"vocab_size": -1},
    8: _PARAMS | {"vocab_size": 16, "rope_theta": 500000.0, "use_scaled_rope": True},
}

_BY_ROWS = {"q": "attention.wq", "k": "attention.wk", "v": "attention.wv"} | {
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
}
_BY_COLUMNS = {"o": "attention.wo", "down": "feed_forward.w2"}
_WHOLE = {"attention_norm": "attention_norm", "ffn_norm": "ffn_norm"}


def folder(parts: int) -> Path:
    """Where the golden in this many parts is."""
    return FOLDER / f"meta-{parts}"


def split(
    config: LlamaConfig, params: dict[str, Any], parts: int, *, llama3: bool = False
) -> list[dict[str, np.ndarray]]:
    """Every part's tensors by Meta's names, each C-contiguous."""
    rows = {"output.weight": params["lm_head"]["kernel"].T}
    columns: dict[str, np.ndarray] = {}
    (rows if llama3 else columns)["tok_embeddings.weight"] = params["embed"]["embedding"]
    whole = {
        "norm.weight": params["final_norm"]["scale"],
        "rope.freqs": 10_000.0 ** (-np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim),
    }
    for layer in range(config.num_hidden_layers):
        stored = projections(params, layer, interleaved=True)
        for names, into in ((_BY_ROWS, rows), (_BY_COLUMNS, columns), (_WHOLE, whole)):
            into.update({f"layers.{layer}.{name}.weight": stored[key] for key, name in names.items()})
    pieces = {name: np.split(array, parts, axis=0) for name, array in rows.items()}
    pieces |= {name: np.split(array, parts, axis=1) for name, array in columns.items()}
    pieces |= {name: [array] * parts for name, array in whole.items()}
    return [{name: np.ascontiguousarray(p[part]) for name, p in pieces.items()} for part in range(parts)]
