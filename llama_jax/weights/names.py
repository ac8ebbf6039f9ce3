"""The table of tensor names in every format, and the conversion of a stored [out, in] matrix to a leaf."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.errors import ConfigError

Format = Literal["hf", "meta", "gguf", "llama2c", "orbax"]

# Formats that store the leaves of `params` unchanged: stacked over layers, named by their path.
STACKED: frozenset[Format] = frozenset(("orbax",))

# Formats whose rotary pairs are dimensions (2i, 2i + 1). Hugging Face and llama_jax pair (i, i + H/2).
_INTERLEAVED: frozenset[Format] = frozenset(("meta", "gguf", "llama2c"))
# The architectures of GGUF, and of them those that pair as Hugging Face does (`LLAMA_ROPE_TYPE_NEOX` of
# llama.cpp's src/llama-model.cpp).
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
_GGUF_HALVES = ("qwen2", "qwen3")


def gguf_architecture(config: LlamaConfig) -> str:
    """The architecture of llama.cpp that computes this model."""
    if config.num_experts:
        return "llama"
    if config.qk_norm:
        return "qwen3"
    if config.rope_layers:
        return "smollm3"
    return "qwen2" if config.qkv_bias and not (config.out_bias or config.mlp_bias) else "llama"


def is_interleaved(format: Format, config: LlamaConfig) -> bool:
    """Whether rotary pairs are dimensions (2i, 2i + 1) in this format of the model."""
    halves = format == "gguf" and gguf_architecture(config) in _GGUF_HALVES
    return format in _INTERLEAVED and not halves


def split_rotary_pairs(x: np.ndarray, *, inverse: bool = False) -> np.ndarray:
    """Permutes rotary dimensions from interleaved pairs to split halves.

    Dimension 2i moves to i, and 2i + 1 to i + H/2. The same permutation of queries and keys leaves attention
    scores unchanged, because RoPE (arXiv 2104.09864) rotates each pair independently.

    Args:
      x: [..., H], H even.
      inverse: permute from split halves to interleaved pairs.

    Returns:
      [..., H] in `x`'s dtype, a view where NumPy allows it.
    """
    pairs = (2, x.shape[-1] // 2) if inverse else (x.shape[-1] // 2, 2)
    return x.reshape(*x.shape[:-1], *pairs).swapaxes(-1, -2).reshape(x.shape)


def transpose(matrix: np.ndarray) -> np.ndarray:
    """Returns the C-contiguous transpose, several times faster than NumPy's copy for large matrices."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    # Blocks of 16 rows keep the cache lines that are written in L1.
    for row in range(0, len(matrix), 16):
        out[:, row : row + 16] = matrix[row : row + 16].T
    return out


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of `params`: its path, its shape, and its name in every format.

    Attributes:
      path: keys from the root of `params`. Leaves under "layers" are one stored tensor per layer.
      axes: the leaf's dimensions, by letter, without the layer axis. "D->NH" is a matrix that maps D
        to N*H: every format stores it transposed and flattened, as [N*H, D]. "->NH" is its bias, stored as
        [N*H]. Without an arrow, the leaf is stored unchanged.
      hf, meta, gguf, llama2c: the stored name, with {layer} for the layer index. llama2.c's format has no
        names; these are the variable names in its C program. Empty where a format has no such tensor.
      needs: the field of the configuration that is set in models with this leaf; empty for all models.
      rotary: whether the last dimension of the leaf is rotated, so that the order of its rotary pairs
        depends on the format.
      expert: for a matrix of an expert of a mixture, its index, {expert} in the names. Formats store one
        matrix per expert; in `params`, and so in Orbax, all are one leaf with a leading axis E.
    """

    path: tuple[str, ...]
    axes: str
    hf: str
    meta: str
    gguf: str
    llama2c: str
    needs: str = ""
    rotary: bool = False
    expert: int | None = None

    @property
    def per_layer(self) -> bool:
        """Whether the leaf is under "layers"."""
        return self.path[0] == "layers"

    def name(self, format: Format, layer: int | None = None) -> str:
        """Returns the stored name in `format`."""
        return self.template(format).replace("{layer}", str(layer))

    def template(self, format: Format) -> str:
        """Returns the stored name in `format`, with {layer} in place of the layer index."""
        return str(getattr(self, format)).replace("{expert}", str(self.expert))

    def shape(self, config: LlamaConfig) -> tuple[int, ...]:
        """Returns the leaf's shape without the axes of layers and experts."""
        return _sizes(self.axes.replace("->", ""), config)

    @property
    def orbax(self) -> str:
        """The stored name in an Orbax checkpoint: the leaf's path, joined with dots."""
        return ".".join(self.path)

    def stored_shape(self, config: LlamaConfig, format: Format) -> tuple[int, ...]:
        """Returns the shape that checkpoints store: [out, in] for a matrix, except in stacked formats."""
        if format in STACKED:
            experts = () if self.expert is None else (config.num_experts,)
            return (config.num_hidden_layers,) * self.per_layer + experts + self.shape(config)
        inputs, arrow, outputs = self.axes.partition("->")
        if not arrow:
            return _sizes(inputs, config)
        rows = math.prod(_sizes(outputs, config))
        return (rows, math.prod(_sizes(inputs, config))) if inputs else (rows,)

    def from_stored(self, array: np.ndarray, config: LlamaConfig, format: Format) -> np.ndarray:
        """Converts a tensor in the layout of `format` to this leaf (of one layer).

        Args:
          array: `stored_shape(config, format)`, any dtype.

        Returns:
          `shape(config)` in the same dtype, C-contiguous; `array` itself if nothing changes.
        """
        array = self.convert_layout(array, config, format, "hf")
        if array.ndim == 2 and "->" in self.axes:
            array = transpose(array)
        return np.ascontiguousarray(array).reshape(self.shape(config))

    def to_stored(self, array: np.ndarray, config: LlamaConfig, format: Format) -> np.ndarray:
        """Converts this leaf (of one layer) to the layout of `format`; the inverse of `from_stored`.

        Args:
          array: `shape(config)`, any dtype.

        Returns:
          `stored_shape(config, format)` in the same dtype, C-contiguous.
        """
        if "->" in self.axes:
            array = array.reshape(self.stored_shape(config, "hf")[::-1])
            array = transpose(array) if array.ndim == 2 else array
        return np.ascontiguousarray(self.convert_layout(array, config, "hf", format))

    def convert_layout(
        self, array: np.ndarray, config: LlamaConfig, source: Format, target: Format
    ) -> np.ndarray:
        """Converts a tensor from one format's layout to another's; neither format may be stacked.

        Args:
          array: `stored_shape(config, source)`, any dtype.

        Returns:
          `stored_shape(config, target)`, C-contiguous; `array` itself if the layouts are equal.
        """
        interleaved = is_interleaved(target, config)
        if not self.rotary or is_interleaved(source, config) == interleaved:
            return array
        # Rotary dimensions are rows of [out, in], so this permutes rows and transposes nothing.
        rows = np.arange(len(array)).reshape(-1, config.head_dim)
        return array[split_rotary_pairs(rows, inverse=interleaved).reshape(-1)]


def _sizes(letters: str, config: LlamaConfig) -> tuple[int, ...]:
    sizes = {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "F": config.intermediate_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "E": config.num_experts,
        "C": len(config.labels),
    }
    return tuple(sizes[letter] for letter in letters)


EMBEDDING = Leaf(
    ("embed", "embedding"),
    "VD",
    hf="model.embed_tokens.weight",
    meta="tok_embeddings.weight",
    gguf="token_embd.weight",
    llama2c="token_embedding_table",
)
_FINAL_NORM = Leaf(
    ("final_norm", "scale"),
    "D",
    hf="model.norm.weight",
    meta="norm.weight",
    gguf="output_norm.weight",
    llama2c="rms_final_weight",
)
LM_HEAD = Leaf(
    ("lm_head", "kernel"),
    "D->V",
    hf="lm_head.weight",
    meta="output.weight",
    gguf="output.weight",
    llama2c="wcls",
)

# Replaces the output projection in a classifier or reward model; C is the number of labels. The formats
# without a name for it cannot store one.
SCORE = Leaf(("score", "kernel"), "D->C", hf="score.weight", meta="", gguf="", llama2c="")
HEAD_DTYPE = np.dtype(np.float32)  # in memory, whatever the dtype of the other parameters: it is small

# The leaves of one layer, under params["layers"]. A star marks rotary leaves, a dash a format without a name.
_LAYER_TABLE = """
attention_norm.scale  D       input_layernorm           attention_norm   attn_norm    rms_att_weight
attention.wq          D->NH*  self_attn.q_proj          attention.wq     attn_q       wq
attention.wk          D->KH*  self_attn.k_proj          attention.wk     attn_k       wk
attention.wv          D->KH   self_attn.v_proj          attention.wv     attn_v       wv
attention.wo          NH->D   self_attn.o_proj          attention.wo     attn_output  wo
ffn_norm.scale        D       post_attention_layernorm  ffn_norm         ffn_norm     rms_ffn_weight
feed_forward.w_gate   D->F    mlp.gate_proj             feed_forward.w1  ffn_gate     w1
feed_forward.w_up     D->F    mlp.up_proj               feed_forward.w3  ffn_up       w3
feed_forward.w_down   F->D    mlp.down_proj             feed_forward.w2  ffn_down     w2
"""
# Those of Llama's kin, and the field of the configuration that they need.
_KIN_TABLE = """
attention.bq      ->NH*  self_attn.q_proj  -  attn_q       -  qkv_bias
attention.bk      ->KH*  self_attn.k_proj  -  attn_k       -  qkv_bias
attention.bv      ->KH   self_attn.v_proj  -  attn_v       -  qkv_bias
attention.bo      ->D    self_attn.o_proj  -  attn_output  -  out_bias
attention.q_norm  H*     self_attn.q_norm  -  attn_q_norm  -  qk_norm
attention.k_norm  H*     self_attn.k_norm  -  attn_k_norm  -  qk_norm
feed_forward.b_gate  ->F  mlp.gate_proj  -  ffn_gate  -  mlp_bias
feed_forward.b_up    ->F  mlp.up_proj    -  ffn_up    -  mlp_bias
feed_forward.b_down  ->D  mlp.down_proj  -  ffn_down  -  mlp_bias
"""
# The matrices of one expert of a mixture, in place of a feed-forward layer's.
_EXPERT_TABLE = """
feed_forward.w_gate  D->F  block_sparse_moe.experts.{expert}.w1  -  ffn_gate.{expert}  -
feed_forward.w_up    D->F  block_sparse_moe.experts.{expert}.w3  -  ffn_up.{expert}    -
feed_forward.w_down  F->D  block_sparse_moe.experts.{expert}.w2  -  ffn_down.{expert}  -
"""


def _layer_leaf(path: str, axes: str, hf: str, meta: str, gguf: str, llama2c: str, needs: str = "") -> Leaf:
    suffix = "bias" if axes.startswith("->") else "weight"
    return Leaf(
        ("layers", *path.split(".")),
        axes.removesuffix("*"),
        hf=f"model.layers.{{layer}}.{hf}.{suffix}",
        meta="" if meta == "-" else f"layers.{{layer}}.{meta}.{suffix}",
        gguf=f"blk.{{layer}}.{gguf}.{suffix}",
        llama2c="" if llama2c == "-" else f"{llama2c}[{{layer}}]",
        needs=needs,
        rotary=axes.endswith("*"),
    )


# The leaves of every Llama; the last is the output projection, which a model may do without.
LEAVES: tuple[Leaf, ...] = (
    EMBEDDING,
    *(_layer_leaf(*row.split()) for row in _LAYER_TABLE.strip().splitlines()),
    _FINAL_NORM,
    LM_HEAD,
)
KIN_LEAVES: tuple[Leaf, ...] = tuple(_layer_leaf(*row.split()) for row in _KIN_TABLE.strip().splitlines())

EXPERT_LEAVES: tuple[Leaf, ...] = tuple(
    _layer_leaf(*row.split()) for row in _EXPERT_TABLE.strip().splitlines()
)
_ROUTER = _layer_leaf("feed_forward.router", "D->E", "block_sparse_moe.gate", "-", "ffn_gate_inp", "-")

# Redundant tensors that are ignored on load: rotary tables, which follow from the configuration (GGUF's
# rope_freqs is converted to rope scaling), besides copies of a tied output projection.
_IGNORED: dict[Format, re.Pattern[str]] = {
    "hf": re.compile(
        r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.((original_)?inv_freq|(cos|sin)_cached)"
    ),
    "meta": re.compile(r"rope\.freqs"),
    "gguf": re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?"),
    "llama2c": re.compile(r"freq_cis_(real|imag)"),
}


def check_format(config: LlamaConfig, format: Format) -> None:
    """Checks that a format has a place for what this model has beyond a Llama.

    Raises:
      ConfigError: naming the fields of the configuration for which it has none.
    """
    if format in ("hf", "gguf", "orbax"):  # their writers know the families that they have
        return
    names = ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "sliding_window", "rope_layers", "num_experts")
    kin = [name for name in names if getattr(config, name)]
    if kin:
        raise ConfigError(
            f"the format {format} has only Llamas, and no place for {', '.join(kin)}; use hf, gguf or orbax"
        )


class Entry(NamedTuple):
    """A tensor that a checkpoint must have: stored name, leaf, and layer (None outside the layers)."""

    name: str
    leaf: Leaf
    layer: int | None


def leaves(config: LlamaConfig) -> tuple[Leaf, ...]:
    """Returns the leaves of `config`'s params: no output projection if it is tied or a head replaces it.

    Of a mixture there are leaves for the matrices of each expert, all experts of a matrix in order.
    """
    kin = (leaf for leaf in KIN_LEAVES if getattr(config, leaf.needs))
    embedding, *layers, final_norm, lm_head = LEAVES
    if config.num_experts:
        layers = [*(leaf for leaf in layers if leaf.path[1] != "feed_forward"), _ROUTER]
        layers += [
            dataclasses.replace(leaf, expert=expert)
            for leaf in EXPERT_LEAVES
            for expert in range(config.num_experts)
        ]
    base = (embedding, *layers, *kin, final_norm)
    return base + (lm_head,) * config.has_output + (SCORE,) * bool(config.labels)


def entries(config: LlamaConfig, format: Format) -> Iterator[Entry]:
    """Yields every stored tensor that a checkpoint of `config` must have, layer by layer."""
    for leaf in leaves(config):
        if format in STACKED and leaf.expert:  # one leaf has all experts
            continue
        unstacked = leaf.per_layer and format not in STACKED
        layers = range(config.num_hidden_layers) if unstacked else (None,)
        for layer in layers:
            yield Entry(leaf.name(format, layer), leaf, layer)


def is_ignored(name: str, config: LlamaConfig, format: Format) -> bool:
    """Whether the tensor `name` is redundant in a checkpoint of `config` and ignored on load."""
    tied_copy = config.tie_word_embeddings and name == LM_HEAD.name(format)
    ignored = _IGNORED.get(format)
    return tied_copy or (ignored is not None and ignored.fullmatch(name) is not None)
