"""Plans a GGUF file that llama.cpp and its kin load: metadata, vocabulary and tensors in one file.

Layout: ggml-org/ggml, docs/gguf.md. What a field means is what llama.cpp does with it (src/llama-model.cpp).
"""

from __future__ import annotations

import functools
import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.quants import quantize

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.rope import effective_theta, rotary_frequencies
from llama_jax.weights.gguf import LLAMA3_FIELDS, LLAMA3_PREFIX
from llama_jax.weights.gguf_header import MAGIC
from llama_jax.weights.names import Leaf
from llama_jax.weights.source import FLOAT_DTYPES
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast
from llama_jax.weights.write.hf import layer_by_layer
from llama_jax.weights.write.plan import Piece, Plan, Region
from llama_jax.weights.write.vocabulary import Vocabulary

_FILE = "model.gguf"
_VERSION = 3
_ALIGNMENT = 32
_QUANTIZATION_VERSION = 2  # of the Q8_0 blocks
_CHUNK = 1 << 17  # values quantised at once, as one row: gguf.quants is slower and larger on a model's own

_KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK, _BLOCK_BYTES = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
_TOKENIZER = "tokenizer.ggml."
_UNUSED = 5  # the type of a token that stands for an id without one


def plan_gguf(
    tensors: Tensors, dtype: str | None, vocabulary: Vocabulary, *, name: str | None = None
) -> Plan:
    """Plans a GGUF file of the llama architecture.

    Vectors are always F32, as llama.cpp wants them, and a matrix whose rows Q8_0's blocks of 32 do not
    divide is F16. Without a vocabulary the file says so (`no_vocab`) and takes ids alone.

    Args:
      tensors: what to write.
      dtype: float32, float16, bfloat16 or q8_0; None keeps each matrix as it is, F64 as F32.
      vocabulary: its fields go into the metadata.
      name: the model's, for people.

    Raises:
      CheckpointError: if the vocabulary is larger than the model's.
      ConfigError: for rope scaling that llama.cpp would run differently.
    """
    config = tensors.config
    entries, divisors = layer_by_layer(config), _divisors(config)
    rows = [] if divisors is None else [_Row("rope_freqs.weight", divisors.shape, "F32")]
    for _, leaf, layer in entries:
        shape = leaf.stored_shape(config, "gguf")
        rows.append(_Row(leaf.name("gguf", layer), shape, _kind(shape, dtype, tensors.dtype(leaf, layer))))
    fields: dict[str, Any] = {"general.architecture": "llama", "general.type": "model"}
    if name is not None:
        fields["general.name"] = name
    fields |= _type_fields(rows) | _model_fields(config) | _rope_fields(config)
    fields |= _vocabulary_fields(vocabulary, config.vocab_size)
    header, offsets = _header(fields, rows)
    pieces, regions = [Piece(_FILE, 0, header)], []
    if divisors is not None:
        pieces.append(Piece(_FILE, offsets[0], divisors.tobytes()))
    first = len(rows) - len(entries)
    for entry, row, offset in zip(entries, rows[first:], offsets[first:-1], strict=True):
        encode = functools.partial(_encode, leaf=entry.leaf, config=config, kind=row.kind)
        regions.append(Region(_FILE, offset, row.nbytes, entry.leaf, entry.layer, encode))
    return Plan("gguf", True, {_FILE: offsets[-1]}, pieces, {}, regions)


class _Row(NamedTuple):
    """One tensor in the file's table; `kind` is GGUF's name of its type."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def nbytes(self) -> int:
        values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        return math.prod(self.shape) // values * nbytes


def _kind(shape: tuple[int, ...], dtype: str | None, own: np.dtype[Any]) -> str:
    if len(shape) == 1:
        return "F32"
    kind = _KINDS.get(own.name if dtype is None else dtype, "F32")
    return "F16" if kind == "Q8_0" and shape[-1] % _BLOCK else kind


def _encode(array: np.ndarray, *, leaf: Leaf, config: LlamaConfig, kind: str) -> np.ndarray:
    """A tensor's bytes, from Hugging Face's layout in any float dtype."""
    array = leaf.reordered(array, config, "hf", "gguf")
    if kind != "Q8_0":
        return cast(array, FLOAT_DTYPES[kind])
    values = array.reshape(-1)
    out = np.empty((values.size // _BLOCK, _BLOCK_BYTES), np.uint8)
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK].astype(np.float32, copy=False)
        first = start // _BLOCK
        blocks = quantize(chunk[None], GGMLQuantizationType.Q8_0).reshape(-1, _BLOCK_BYTES)
        out[first : first + len(blocks)] = blocks
    return out


def _type_fields(rows: Sequence[_Row]) -> dict[str, Any]:
    """What most of the matrices are."""
    kinds = Counter(row.kind for row in rows if len(row.shape) > 1)
    ((kind, _),) = kinds.most_common(1)
    return {
        "general.file_type": int(_FILE_TYPES[kind]),
        "general.quantization_version": _QUANTIZATION_VERSION,
    }


def _model_fields(config: LlamaConfig) -> dict[str, Any]:
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        fields |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    return {f"llama.{key}": value for key, value in fields.items()}


def _rope_fields(config: LlamaConfig) -> dict[str, Any]:
    """Rotary settings: what llama.cpp reads, and what it needs not and `llama_jax` would have to guess.

    Raises:
      ConfigError: for what llama.cpp has no field for, or does not read for the llama architecture.
    """
    scaling = config.rope_scaling
    theta = effective_theta(config.rope_theta, scaling, head_dim=config.head_dim)
    kind = None if scaling is None else scaling.kind
    fields: dict[str, Any] = {}
    if scaling is not None and kind == "linear":
        fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": scaling.factor}
    elif scaling is not None and kind == "yarn":
        fields = _yarn_fields(scaling)
    elif scaling is not None and kind == "llama3":
        fields = {f"{LLAMA3_PREFIX}{name}": getattr(scaling, name) for name in LLAMA3_FIELDS}
    return {"llama.rope.dimension_count": config.head_dim, "llama.rope.freq_base": theta} | fields


def _yarn_fields(scaling: RopeScaling) -> dict[str, Any]:
    built_in = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    for name, value in built_in.items():
        if getattr(scaling, name) != value:
            raise ConfigError(
                f"rope_scaling.{name} is {getattr(scaling, name)}; llama.cpp runs a llama's yarn with "
                f"{value}, so that GGUF cannot hold this model: write another format"
            )
    fields = {
        "type": "yarn",
        "factor": scaling.factor,
        "original_context_length": scaling.original_max_position_embeddings,
    }
    if scaling.attention_factor is not None:  # llama.cpp multiplies YaRN's own rule by the field
        fields["attn_factor"] = scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1)
    return {f"llama.rope.scaling.{key}": value for key, value in fields.items()}


def _divisors(config: LlamaConfig) -> np.ndarray | None:
    """Llama 3's scaling as llama.cpp has it: what each frequency is divided by, f32 [H/2]."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    rotary = functools.partial(rotary_frequencies, head_dim=config.head_dim, theta=config.rope_theta)
    (plain, _), (scaled, _) = rotary(scaling=None), rotary(scaling=scaling)
    return (plain / scaled).astype("<f4")


def _vocabulary_fields(vocabulary: Vocabulary, size: int) -> dict[str, Any]:
    """The tokenizer's fields, with names for the ids that the model has beyond its tokens."""
    if not vocabulary.fields:
        return {"tokenizer.ggml.model": "no_vocab"}
    fields = dict(vocabulary.fields)
    tokens = fields[f"{_TOKENIZER}tokens"]
    missing = size - len(tokens)
    if missing < 0:
        raise CheckpointError(
            f"the vocabulary has {len(tokens)} tokens and the model {size}; give the one that belongs to it"
        )
    fields[f"{_TOKENIZER}tokens"] = [*tokens, *(f"[PAD{id}]" for id in range(len(tokens), size))]
    for key, value in (("token_type", _UNUSED), ("scores", 0)):
        if f"{_TOKENIZER}{key}" in fields:
            padded = np.pad(fields[f"{_TOKENIZER}{key}"], (0, missing), constant_values=value)
            fields[f"{_TOKENIZER}{key}"] = padded
    return fields


def _header(fields: Mapping[str, Any], rows: Sequence[_Row]) -> tuple[bytes, list[int]]:
    """All before the tensors' data, and where each tensor begins; the last offset is the file's size."""
    offset, relative = 0, []
    table = b""
    for row in rows:
        dims = row.shape[::-1]
        kind = GGMLQuantizationType[row.kind]
        table += _string(row.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        relative.append(offset)
        offset = _aligned(offset + row.nbytes)
    described = b"".join(_string(key) + _value(value) for key, value in fields.items())
    header = struct.pack("<4sIQQ", MAGIC, _VERSION, len(rows), len(fields)) + described + table
    header = header.ljust(_aligned(len(header)), b"\0")
    return header, [len(header) + each for each in (*relative, offset)]


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _value(value: Any) -> bytes:
    """A field's type and value, as llama.cpp wants them: u32, f32, bool, string, or an array."""
    match value:
        case bool():
            return struct.pack("<I?", GGUFValueType.BOOL, value)
        case int():
            return struct.pack("<II", GGUFValueType.UINT32, value)
        case float():
            return struct.pack("<If", GGUFValueType.FLOAT32, value)
        case str():
            return struct.pack("<I", GGUFValueType.STRING) + _string(value)
        case np.ndarray():
            kind = GGUFValueType.INT32 if value.dtype == np.int32 else GGUFValueType.FLOAT32
            return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)) + value.tobytes()
        case _:
            items = b"".join(map(_string, value))
            return struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(value)) + items


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
