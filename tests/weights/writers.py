"""Reference writers for every format, based on the formats' specifications, not on `llama_jax.weights`.

They encode a parameter tree independently, so that a reader with a wrong transpose, head split or rotary
layout does not agree with them.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from llama_jax.config import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,  # not hidden / heads
    max_position_embeddings=128,
    rms_norm_eps=3e-6,
    rope_theta=50_000.0,
)


def random_params(config: LlamaConfig = CONFIG, seed: int = 0) -> dict[str, Any]:
    """Random stacked f32 parameters whose values are exact in bfloat16 and float16."""
    rng = np.random.default_rng(seed)
    v, d, f, n = config.vocab_size, config.hidden_size, config.intermediate_size, config.num_attention_heads
    k, h, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers

    def sample(*shape: int) -> np.ndarray:
        return (rng.integers(-127, 128, shape) / 64).astype(np.float32)

    params: dict[str, Any] = {
        "embed": {"embedding": sample(v, d)},
        "layers": {
            "attention_norm": {"scale": sample(layers, d)},
            "attention": {
                "wq": sample(layers, d, n, h),
                "wk": sample(layers, d, k, h),
                "wv": sample(layers, d, k, h),
                "wo": sample(layers, n, h, d),
            },
            "ffn_norm": {"scale": sample(layers, d)},
            "feed_forward": {
                "w_gate": sample(layers, d, f),
                "w_up": sample(layers, d, f),
                "w_down": sample(layers, f, d),
            },
        },
        "final_norm": {"scale": sample(d)},
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = {"kernel": sample(d, v)}
    return params


def projections(params: dict[str, Any], layer: int, *, interleaved: bool) -> dict[str, np.ndarray]:
    """One layer's matrices as every format stores them, [out, in]: y = W x for a column x.

    Row n*H + j of a query matrix computes dimension j of head n. With `interleaved`, rotary pairs are
    adjacent: row 2i is our dimension i, and row 2i + 1 our dimension i + H/2.
    """
    attention, feed_forward = params["layers"]["attention"], params["layers"]["feed_forward"]

    def heads(w: np.ndarray, rotary: bool) -> np.ndarray:
        _, count, h = w.shape
        rows = []
        for n in range(count):
            for j in range(h):
                ours = (j // 2 + (j % 2) * (h // 2)) if rotary and interleaved else j
                rows.append(w[:, n, ours])
        return np.stack(rows)

    wo = attention["wo"][layer]
    return {
        "q": heads(attention["wq"][layer], True),
        "k": heads(attention["wk"][layer], True),
        "v": heads(attention["wv"][layer], False),
        "o": np.stack([wo[n, j] for n in range(wo.shape[0]) for j in range(wo.shape[1])], axis=1),
        "gate": np.stack(
            [feed_forward["w_gate"][layer][:, i] for i in range(feed_forward["w_gate"].shape[2])]
        ),
        "up": np.stack([feed_forward["w_up"][layer][:, i] for i in range(feed_forward["w_up"].shape[2])]),
        "down": np.stack(
            [feed_forward["w_down"][layer][:, i] for i in range(feed_forward["w_down"].shape[2])]
        ),
        "attention_norm": params["layers"]["attention_norm"]["scale"][layer],
        "ffn_norm": params["layers"]["ffn_norm"]["scale"][layer],
    }


HF_NAMES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

GGUF_NAMES = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


def hf_tensors(config: LlamaConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    tensors = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
    }
    if "lm_head" in params:
        tensors["lm_head.weight"] = np.ascontiguousarray(params["lm_head"]["kernel"].T)
    for layer in range(config.num_hidden_layers):
        for part, array in projections(params, layer, interleaved=False).items():
            tensors[f"model.layers.{layer}.{HF_NAMES[part]}.weight"] = np.ascontiguousarray(array)
    return tensors


def hf_config(config: LlamaConfig) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
    }


def write_hf(
    folder: Path,
    config: LlamaConfig,
    params: dict[str, Any],
    *,
    dtype: Any = np.float32,
    shards: int = 1,
    extra: dict[str, np.ndarray] | None = None,
    **changes: Any,
) -> Path:
    """Writes a Hugging Face directory; `changes` go into config.json, where None removes a field."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {key: value for key, value in (hf_config(config) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {name: array.astype(dtype) for name, array in hf_tensors(config, params).items()} | (
        extra or {}
    )
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def write_gguf(
    path: Path,
    config: LlamaConfig,
    params: dict[str, Any],
    *,
    kind: str = "F32",
    extra: dict[str, np.ndarray] | None = None,
    **fields: Any,
) -> Path:
    """Writes a GGUF file with the `gguf` package; norms are F32, as in llama.cpp's converter.

    `fields` are additional "llama." metadata, with dots as double underscores; None removes a field.
    """
    writer = gguf.GGUFWriter(path, "llama")
    defaults = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention__head_count": config.num_attention_heads,
        "attention__head_count_kv": config.num_key_value_heads,
        "attention__key_length": config.head_dim,
        "attention__value_length": config.head_dim,
        "attention__layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope__freq_base": config.rope_theta,
        "rope__dimension_count": config.head_dim,
    }
    adders = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in (defaults | fields).items():
        if value is not None:
            adders[type(value)]("llama." + key.replace("__", "."), value)
    tensors = {
        "token_embd.weight": params["embed"]["embedding"],
        "output_norm.weight": params["final_norm"]["scale"],
    }
    if "lm_head" in params:
        tensors["output.weight"] = np.ascontiguousarray(params["lm_head"]["kernel"].T)
    for layer in range(config.num_hidden_layers):
        for part, array in projections(params, layer, interleaved=True).items():
            tensors[f"blk.{layer}.{GGUF_NAMES[part]}.weight"] = np.ascontiguousarray(array)
    quantization = gguf.GGMLQuantizationType[kind]
    for name, array in tensors.items():
        if array.ndim == 1 or kind == "F32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def split_gguf(path: Path, folder: Path, tensors: int) -> list[Path]:
    """Writes the model of `path` again in parts of so many tensors each."""
    folder.mkdir()
    model = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=tensors)
    for field in model.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            element = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element)
    for tensor in model.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.iterdir())


def quantized(params: dict[str, Any], kind: str) -> dict[str, Any]:
    """The parameters after quantization to `kind` and back with the `gguf` package."""
    if kind in ("F32", "F16", "BF16"):
        return params
    quantization = gguf.GGMLQuantizationType[kind]

    def leaf(array: np.ndarray, axis: int, lead: int) -> np.ndarray:
        """Quantizes along `axis`, the input dimension of a matrix, as stored rows are."""
        if array.ndim - lead < 2:
            return array
        moved = np.moveaxis(array, axis, -1)
        rows = gguf.quants.dequantize(
            gguf.quants.quantize(moved.reshape(-1, moved.shape[-1]), quantization), quantization
        )
        return np.moveaxis(rows.reshape(moved.shape), -1, axis)

    layers = params["layers"]
    wo = layers["attention"]["wo"]  # its input dimensions are N and H
    count, n, h, d = wo.shape
    out: dict[str, Any] = {
        "embed": {"embedding": leaf(params["embed"]["embedding"], -1, 0)},
        "layers": {
            "attention_norm": layers["attention_norm"],
            "attention": {name: leaf(layers["attention"][name], 1, 1) for name in ("wq", "wk", "wv")}
            | {"wo": leaf(wo.reshape(count, n * h, d), 1, 1).reshape(wo.shape)},
            "ffn_norm": layers["ffn_norm"],
            "feed_forward": {name: leaf(array, 1, 1) for name, array in layers["feed_forward"].items()},
        },
        "final_norm": params["final_norm"],
    }
    if "lm_head" in params:
        out["lm_head"] = {"kernel": leaf(params["lm_head"]["kernel"], 0, 0)}
    return out


def write_llama2c(
    path: Path, config: LlamaConfig, params: dict[str, Any], *, version: int = 0, group: int = 32
) -> Path:
    """Writes llama2.c's format; version 2 is int8 with scale 1/64, which is exact for `random_params`."""
    tied = "lm_head" not in params
    sizes = [
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    ]
    sizes += [config.num_key_value_heads, config.vocab_size, config.max_position_embeddings]
    layers = [projections(params, layer, interleaved=True) for layer in range(config.num_hidden_layers)]
    embedding, final = params["embed"]["embedding"], params["final_norm"]["scale"]
    classifier = [] if tied else [params["lm_head"]["kernel"].T]

    def all_of(part: str) -> list[np.ndarray]:
        return [layer[part] for layer in layers]

    matrices = [embedding] + [w for part in ("q", "k", "v", "o", "gate", "down", "up") for w in all_of(part)]
    if version == 0:
        sizes[5] *= 1 if tied else -1
        rotary = [np.zeros((config.max_position_embeddings, config.head_dim // 2), np.float32)] * 2
        order = [embedding, *all_of("attention_norm")]
        order += [w for part in ("q", "k", "v", "o") for w in all_of(part)]
        order += [*all_of("ffn_norm"), *(w for part in ("gate", "down", "up") for w in all_of(part))]
        order += [final, *rotary, *classifier]
        path.write_bytes(struct.pack("<7i", *sizes) + b"".join(w.astype("<f4").tobytes() for w in order))
        return path
    header = b"24ka" + struct.pack("<8i?", version, *sizes, tied)
    norms = [*all_of("attention_norm"), *all_of("ffn_norm"), final]
    body = b"".join(w.astype("<f4").tobytes() for w in norms)
    if version == 2:
        header += struct.pack("<i", group)
        for w in matrices + classifier:
            scales = np.full(w.size // group, 1 / 64, "<f4")
            body += np.round(w * 64).astype(np.int8).tobytes() + scales.tobytes()
    else:
        body += b"".join(w.astype("<f4").tobytes() for w in matrices + classifier)
    path.write_bytes(header.ljust(256, b"\0") + body)
    return path


def bfloat16(params: Any) -> Any:
    return np.asarray(params).astype(ml_dtypes.bfloat16)
