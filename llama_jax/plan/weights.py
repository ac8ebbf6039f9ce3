"""Parameters by matrix: how many there are, how the mesh shards them, and how many each device holds."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from llama_jax.config import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A weight matrix.

    Attributes:
      name: as in the parameter tree.
      inputs, outputs: its dimensions, those of several heads merged.
      saved: the name of its result in a remat policy; empty where no policy saves it.
      experts: how many there are of it in a layer.
      active: how many of them a token is multiplied with.
    """

    name: str
    inputs: int
    outputs: int
    saved: str = ""
    experts: int = 1
    active: int = 1

    @property
    def size(self) -> int:
        """Weights of a layer."""
        return self.inputs * self.outputs * self.experts

    @property
    def products(self) -> int:
        """Multiplications of a token in a layer."""
        return self.inputs * self.outputs * self.active


def layer_matrices(model: LlamaConfig) -> tuple[Matrix, ...]:
    """The matrices of one layer, in the order in which the forward pass uses them."""
    d, f = model.hidden_size, model.intermediate_size
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    of_experts = functools.partial(
        Matrix, experts=max(model.num_experts, 1), active=max(model.num_experts_per_tok, 1)
    )
    return (
        Matrix("wq", d, queries, "q"),
        Matrix("wk", d, keys, "k"),
        Matrix("wv", d, keys, "v"),
        Matrix("wo", queries, d, "residual"),
        of_experts("w_gate", d, f, "gate"),
        of_experts("w_up", d, f, "up"),
        of_experts("w_down", f, d),
    )


def layer_size(model: LlamaConfig, expert: int = 1) -> float:
    """Matrix weights of one layer; of the experts, those of one index of the mesh axis `expert`."""
    dense, experts = dense_and_experts(model)
    return dense + experts / expert


def dense_and_experts(model: LlamaConfig) -> tuple[int, int]:
    """Matrix weights of one layer outside of its experts, and of all its experts."""
    experts = sum(matrix.size for matrix in layer_matrices(model) if _is_expert(model, matrix))
    return sum(matrix.size for matrix in layer_matrices(model)) - experts, experts


def expert_rows(model: LlamaConfig, expert: int = 1) -> float:
    """Rows of a feed-forward layer's buffers for each token of a device (`ops.experts`).

    Over the mesh axis `expert` all tokens are gathered, and each may choose the experts of one device.
    """
    if not model.num_experts:
        return 1
    return expert * min(model.num_experts_per_tok, model.num_experts // expert)


def chosen_share(model: LlamaConfig, tokens: float) -> float:
    """The expected share of a layer's experts that any of so many tokens chooses, if it chooses at random."""
    if not model.num_experts:
        return 1.0
    return 1 - (1 - model.num_experts_per_tok / model.num_experts) ** tokens


def table_size(model: LlamaConfig) -> int:
    """Weights of the embedding table, and of the output projection where it is not the table."""
    return model.vocab_size * model.hidden_size


def norm_size(model: LlamaConfig) -> int:
    """Scales of all norms, and a head's weights: what every device holds whole."""
    return ((2 * model.num_hidden_layers + 1) + len(model.labels)) * model.hidden_size


def param_shards(mesh: Mapping[str, int]) -> int:
    """The number of shards of weights besides `tensor`: `sharding.PARAMS`. Experts stay where they are."""
    return mesh["fsdp"] * mesh.get("expert", 1) * mesh["context"]


def parameters_per_chip(model: LlamaConfig, mesh: Mapping[str, int]) -> float:
    """Parameters of which a device holds its shard: matrices over all axes but `data`, norms whole."""
    norms = norm_size(model)
    return (model.num_params - norms) / (param_shards(mesh) * mesh["tensor"]) + norms


# Bytes of a weight, and of the scales of an output or a group of inputs: `ops.quantization`.
_PLAIN = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_GROUPED = {"int4": 0.5 + 4 / 32, "nf4": 0.5 + 4 / 64}  # an f16 scale and minimum; an f32 scale
WEIGHT_DTYPES = (*_PLAIN, "int8", *_GROUPED)


def matrix_bytes(matrix: Matrix, dtype: str, plain: str = "bfloat16") -> float:
    """Bytes of a matrix in a dtype, or quantized as `ops.quantization.quantize` does.

    Args:
      matrix: of a layer, or a table.
      dtype: one of `WEIGHT_DTYPES`.
      plain: the dtype of what is not quantized.
    """
    if dtype in _PLAIN:
        return _PLAIN[dtype] * matrix.size
    if dtype == "int4" and matrix.name in ("wk", "wv") and 2 * matrix.outputs <= matrix.inputs:
        return _PLAIN[plain] * matrix.size
    if dtype == "int8" or (dtype == "int4" and matrix.name in ("embedding", "kernel")):
        return matrix.size + 4 * matrix.outputs * matrix.experts
    return _GROUPED[dtype] * matrix.size


def layer_bytes(model: LlamaConfig, dtype: str) -> tuple[float, float]:
    """Bytes of one layer's matrices outside of its experts, and of all its experts."""
    experts = sum(
        matrix_bytes(matrix, dtype) for matrix in layer_matrices(model) if _is_expert(model, matrix)
    )
    return sum(matrix_bytes(matrix, dtype) for matrix in layer_matrices(model)) - experts, experts


def _is_expert(model: LlamaConfig, matrix: Matrix) -> bool:
    return model.num_experts > 0 and matrix.name.startswith("w_")


def table_bytes(model: LlamaConfig, dtype: str) -> float:
    """Bytes of the embedding table; the output projection has as many."""
    return matrix_bytes(Matrix("embedding", model.hidden_size, model.vocab_size), dtype)
