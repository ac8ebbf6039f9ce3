"""Plans a GGUF file for llama.cpp and compatible programs: metadata, vocabulary and tensors in one file.

Layout: ggml-org/ggml, docs/gguf.md. The meaning of each field follows llama.cpp (src/llama-model.cpp).
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
from llama_jax.weights.gguf import LLAMA3_FIELDS, LLAMA3_PREFIX, smollm3_rope_layers
from llama_jax.weights.gguf_header import MAGIC
from llama_jax.weights.names import Leaf, gguf_architecture
from llama_jax.weights.source import FLOAT_DTYPES
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast
from llama_jax.weights.write.hf import layer_by_layer
from llama_jax.weights.write.plan import Blob, Plan, Region
from llama_jax.weights.write.vocabulary import Vocabulary

_FILE = "model.gguf"
_VERSION = 3
_ALIGNMENT = 32
_QUANTIZATION_VERSION = 2  # of the Q8_0 block layout
# Values quantized per call, as one row: gguf.quants is slower and takes more memory on the matrix's own rows.
_CHUNK = 1 << 17

_GGML_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}
_BLOCK, _BLOCK_BYTES = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
_TOKENIZER = "tokenizer.ggml."
_TOKEN_TYPE_UNUSED = 5


def plan_gguf(
    tensors: Tensors, dtype: str | None, vocabulary: Vocabulary, *, name: str | None = None
) -> Plan:
    """Plans a GGUF file of the architecture that llama.cpp computes the model with.

    Vectors are always F32, as llama.cpp requires. With Q8_0, a matrix whose row length is not a multiple of
    the block size 32 is F16. Without a vocabulary the tokenizer model is `no_vocab`, and the file takes token
    ids only.

    Args:
      tensors: the tensors to write.
      dtype: float32, float16, bfloat16 or q8_0; None keeps each matrix's dtype, F64 as F32.
      vocabulary: the tokenizer, whose fields go into the metadata.
      name: the model's display name.

    Raises:
      CheckpointError: if the tokenizer has more tokens than the model.
      ConfigError: for what llama.cpp computes differently, or not at all.
    """
    config = tensors.config
    _check_kin(config)
    entries, rope_factors = layer_by_layer(config), _rope_factors(config)
    infos = []
    if rope_factors is not None:
        infos.append(_TensorInfo("rope_freqs.weight", rope_factors.shape, "F32"))
    numbers = []  # of the tensor of each entry: the experts of a matrix are one tensor
    for _, leaf, layer in entries:
        if not leaf.expert:
            infos.append(_tensor_info(config, leaf, layer, dtype, tensors.dtype(leaf, layer)))
        numbers.append(len(infos) - 1)
    fields: dict[str, Any] = {"general.architecture": gguf_architecture(config), "general.type": "model"}
    if name is not None:
        fields["general.name"] = name
    fields |= _file_type_fields(infos) | _model_fields(config) | _rope_fields(config)
    fields |= _vocabulary_fields(vocabulary, config.vocab_size)
    header, offsets = _header(fields, infos)
    blobs, regions = [Blob(_FILE, 0, header)], []
    if rope_factors is not None:
        blobs.append(Blob(_FILE, offsets[0], rope_factors.tobytes()))
    for (_, leaf, layer), number in zip(entries, numbers, strict=True):
        info, offset = infos[number], offsets[number]
        encode = functools.partial(_encode, leaf=leaf, config=config, ggml_type=info.ggml_type)
        nbytes = info.nbytes if leaf.expert is None else info.nbytes // config.num_experts
        regions.append(Region(_FILE, offset + nbytes * (leaf.expert or 0), nbytes, leaf, layer, encode))
    return Plan("gguf", True, {_FILE: offsets[-1]}, blobs, {}, regions)


class _TensorInfo(NamedTuple):
    """An entry of the file's tensor table."""

    name: str
    shape: tuple[int, ...]
    ggml_type: str

    @property
    def nbytes(self) -> int:
        values, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.ggml_type]]
        return math.prod(self.shape) // values * nbytes


def _tensor_info(
    config: LlamaConfig, leaf: Leaf, layer: int | None, dtype: str | None, stored_dtype: np.dtype[Any]
) -> _TensorInfo:
    name, shape = leaf.name("gguf", layer), leaf.stored_shape(config, "gguf")
    if leaf.expert is not None:
        name = name.replace(f".{leaf.expert}.weight", "_exps.weight")
        shape = (config.num_experts, *shape)
    # llama.cpp reads routers in F32.
    ggml_type = "F32" if leaf.path[-1] == "router" else _ggml_type(shape, dtype, stored_dtype)
    return _TensorInfo(name, shape, ggml_type)


def _ggml_type(shape: tuple[int, ...], dtype: str | None, stored_dtype: np.dtype[Any]) -> str:
    if len(shape) == 1:
        return "F32"
    ggml_type = _GGML_TYPES.get(stored_dtype.name if dtype is None else dtype, "F32")
    return "F16" if ggml_type == "Q8_0" and shape[-1] % _BLOCK else ggml_type


def _encode(array: np.ndarray, *, leaf: Leaf, config: LlamaConfig, ggml_type: str) -> np.ndarray:
    """Encodes a tensor given in Hugging Face's layout and any float dtype."""
    array = leaf.convert_layout(array, config, "hf", "gguf")
    if ggml_type != "Q8_0":
        return cast(array, FLOAT_DTYPES[ggml_type])
    values = array.reshape(-1)
    out = np.empty((values.size // _BLOCK, _BLOCK_BYTES), np.uint8)
    for start in range(0, values.size, _CHUNK):
        chunk = values[start : start + _CHUNK].astype(np.float32, copy=False)
        first = start // _BLOCK
        blocks = quantize(chunk[None], GGMLQuantizationType.Q8_0).reshape(-1, _BLOCK_BYTES)
        out[first : first + len(blocks)] = blocks
    return out


def _file_type_fields(infos: Sequence[_TensorInfo]) -> dict[str, Any]:
    """The file type: that of most of the matrices."""
    counts = Counter(info.ggml_type for info in infos if len(info.shape) > 1)
    ((ggml_type, _),) = counts.most_common(1)
    return {
        "general.file_type": int(_FILE_TYPES[ggml_type]),
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
    if config.num_experts:
        fields |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    if config.sliding_window is not None:
        fields["attention.sliding_window"] = config.sliding_window
    return {f"{gguf_architecture(config)}.{key}": value for key, value in fields.items()}


def _check_kin(config: LlamaConfig) -> None:
    """Refuses models that no architecture of llama.cpp computes.

    Raises:
      ConfigError: naming what it has no place for.
    """
    architecture = gguf_architecture(config)
    problem = ""
    biases = config.qkv_bias or config.out_bias or config.mlp_bias
    if config.num_experts and (config.qk_norm or biases or config.rope_layers):
        problem = "biases, norms of queries and keys or layers without rotation beside experts"
    elif config.qk_norm and biases:
        problem = "biases beside norms of queries and keys"
    elif config.qk_norm and config.rope_layers:
        problem = "layers without rotation beside norms of queries and keys"
    elif config.rope_layers and biases:
        problem = "biases beside layers without rotation"
    elif config.rope_layers and config.rope_layers != smollm3_rope_layers(config.num_hidden_layers):
        problem = "layers without rotation other than every fourth"
    elif config.window_layers:
        problem = "a window in some of the layers"
    if problem:
        raise ConfigError(
            f"llama.cpp's architecture {architecture} has no place for {problem}; use hf or orbax"
        )


def _rope_fields(config: LlamaConfig) -> dict[str, Any]:
    """The rotary fields; for Llama 3's scaling, which llama.cpp has no fields for, those of `llama_jax`.

    Raises:
      ConfigError: for settings that llama.cpp has no field for, or ignores for the llama architecture.
    """
    scaling = config.rope_scaling
    theta = effective_theta(config.rope_theta, scaling, head_dim=config.head_dim)
    kind = None if scaling is None else scaling.kind
    fields: dict[str, Any] = {}
    if scaling is not None and kind == "linear":
        fields = {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    elif scaling is not None and kind == "yarn":
        fields = _yarn_fields(scaling)
    fields |= {"rope.dimension_count": config.head_dim, "rope.freq_base": theta}
    own = {f"{LLAMA3_PREFIX}{name}": getattr(scaling, name) for name in LLAMA3_FIELDS if kind == "llama3"}
    return {f"{gguf_architecture(config)}.{key}": value for key, value in fields.items()} | own


def _yarn_fields(scaling: RopeScaling) -> dict[str, Any]:
    built_in = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    for name, value in built_in.items():
        if getattr(scaling, name) != value:
            raise ConfigError(
                f"rope_scaling.{name} is {getattr(scaling, name)}; llama.cpp runs YaRN with {value} for the "
                "llama architecture, so GGUF cannot represent this model; use another format"
            )
    fields = {
        "type": "yarn",
        "factor": scaling.factor,
        "original_context_length": scaling.original_max_position_embeddings,
    }
    if scaling.attention_factor is not None:  # a factor on top of YaRN's own in llama.cpp
        fields["attn_factor"] = scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1)
    return {f"rope.scaling.{key}": value for key, value in fields.items()}


def _rope_factors(config: LlamaConfig) -> np.ndarray | None:
    """Llama 3's scaling as llama.cpp stores it: the divisor of each frequency, f32 [H/2]."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    rotary = functools.partial(rotary_frequencies, head_dim=config.head_dim, theta=config.rope_theta)
    (unscaled, _), (scaled, _) = rotary(scaling=None), rotary(scaling=scaling)
    return (unscaled / scaled).astype("<f4")


def _vocabulary_fields(vocabulary: Vocabulary, size: int) -> dict[str, Any]:
    """The tokenizer's fields, padded with [PADn] tokens to the model's vocabulary size."""
    if not vocabulary.fields:
        return {"tokenizer.ggml.model": "no_vocab"}
    fields = dict(vocabulary.fields)
    tokens = fields[f"{_TOKENIZER}tokens"]
    missing = size - len(tokens)
    if missing < 0:
        raise CheckpointError(
            f"the tokenizer has {len(tokens)} tokens and the model {size}; use the model's own tokenizer"
        )
    fields[f"{_TOKENIZER}tokens"] = [*tokens, *(f"[PAD{id}]" for id in range(len(tokens), size))]
    for key, value in (("token_type", _TOKEN_TYPE_UNUSED), ("scores", 0)):
        if f"{_TOKENIZER}{key}" in fields:
            padded = np.pad(fields[f"{_TOKENIZER}{key}"], (0, missing), constant_values=value)
            fields[f"{_TOKENIZER}{key}"] = padded
    return fields


def _header(fields: Mapping[str, Any], infos: Sequence[_TensorInfo]) -> tuple[bytes, list[int]]:
    """The bytes before the tensor data, and the file offset of each tensor followed by the file size."""
    offset, relative_offsets = 0, []
    table = b""
    for info in infos:
        dims = info.shape[::-1]
        ggml_type = GGMLQuantizationType[info.ggml_type]
        table += _pack_string(info.name)
        table += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset)
        relative_offsets.append(offset)
        offset = _align(offset + info.nbytes)
    metadata = b"".join(_pack_string(key) + _pack_value(value) for key, value in fields.items())
    header = struct.pack("<4sIQQ", MAGIC, _VERSION, len(infos), len(fields)) + metadata + table
    header = header.ljust(_align(len(header)), b"\0")
    return header, [len(header) + relative for relative in (*relative_offsets, offset)]


def _align(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT


def _pack_value(value: Any) -> bytes:
    """A field's type and value: u32, f32, bool, string, or an array."""
    match value:
        case bool():
            return struct.pack("<I?", GGUFValueType.BOOL, value)
        case int():
            return struct.pack("<II", GGUFValueType.UINT32, value)
        case float():
            return struct.pack("<If", GGUFValueType.FLOAT32, value)
        case str():
            return struct.pack("<I", GGUFValueType.STRING) + _pack_string(value)
        case np.ndarray():
            kind = GGUFValueType.INT32 if value.dtype == np.int32 else GGUFValueType.FLOAT32
            return struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(value)) + value.tobytes()
        case _:
            items = b"".join(map(_pack_string, value))
            return struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(value)) + items


def _pack_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
