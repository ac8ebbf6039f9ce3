"""Plans a Hugging Face directory: config.json, generation_config.json, safetensors files and their index."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.config import LlamaConfig
from llama_jax.rope import effective_theta
from llama_jax.weights.hf import CLASSIFIER, problem_type
from llama_jax.weights.names import Entry, entries
from llama_jax.weights.source import FLOAT_DTYPES
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast
from llama_jax.weights.write.plan import Piece, Plan, Region
from llama_jax.weights.write.vocabulary import Vocabulary

SHARD_BYTES = 5_000_000_000  # what `save_pretrained` has written for years
_NAMES = {dtype: name for name, dtype in FLOAT_DTYPES.items()}


def plan_hf(
    tensors: Tensors,
    dtype: np.dtype[Any] | None,
    vocabulary: Vocabulary,
    *,
    shard_bytes: int = SHARD_BYTES,
    shards: int | None = None,
) -> Plan:
    """Plans a directory as Hugging Face's `save_pretrained` writes it.

    Args:
      tensors: what to write.
      dtype: of every tensor; None keeps each as it is.
      vocabulary: its files are put beside.
      shard_bytes: the most bytes of tensors in one file; a larger tensor has one to itself.
      shards: into how many files of about the same size to put them instead, at most.
    """
    config = tensors.config
    dtypes = {entry: dtype or tensors.dtype(entry.leaf, entry.layer) for entry in layer_by_layer(config)}
    filled = _shards(config, dtypes, shard_bytes) if shards is None else _equal_shards(config, dtypes, shards)
    parts = list(filled)
    files, pieces, regions, places = {}, [], [], {}
    for number, shard in enumerate(parts, 1):
        many = f"model-{number:05}-of-{len(parts):05}.safetensors"
        file = many if len(parts) > 1 else "model.safetensors"
        header, offset = _header(config, shard, dtypes), 0
        pieces.append(Piece(file, 0, header))
        for entry in shard:
            nbytes, encode = (
                _nbytes(config, entry, dtypes[entry]),
                functools.partial(cast, dtype=dtypes[entry]),
            )
            region = Region(file, len(header) + offset, nbytes, entry.leaf, entry.layer, encode)
            offset += nbytes
            regions.append(region)
            places[entry.name] = file
        files[file] = len(header) + offset
    extras = dict(vocabulary.files)
    main = dtype or dtypes[next(iter(dtypes))]
    extras["config.json"] = _json(config_fields(config, vocabulary) | {"torch_dtype": main.name})
    if not config.labels:
        extras["generation_config.json"] = _json({"_from_model_config": True} | _ids(vocabulary))
    if len(parts) > 1:
        total = sum(region.nbytes for region in regions)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        extras["model.safetensors.index.json"] = _json(index)
    return Plan("hf", False, files, pieces, extras, regions)


def layer_by_layer(config: LlamaConfig) -> list[Entry]:
    """Every tensor in the order in which a model uses them: embedding, layers, final norm, output."""
    listed = list(entries(config, "hf"))
    first, last = listed[:1], [entry for entry in listed[1:] if entry.layer is None]
    layers = [entry for entry in listed if entry.layer is not None]
    return [*first, *sorted(layers, key=lambda entry: entry.layer or 0), *last]


def config_fields(config: LlamaConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """The fields of a config.json, those that `read_config` reads and those that other programs want."""
    fields = {
        "architectures": [CLASSIFIER if config.labels else "LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        **_rope(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    return fields | _head(config) | _ids(vocabulary)


def _head(config: LlamaConfig) -> dict[str, Any]:
    """What a classifier's configuration says of its classes."""
    if not config.labels:
        return {}
    return {
        "id2label": {str(i): name for i, name in enumerate(config.labels)},
        "label2id": {name: i for i, name in enumerate(config.labels)},
        "problem_type": problem_type(len(config.labels)),
    }


def _rope(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    theta = effective_theta(config.rope_theta, scaling, head_dim=config.head_dim)
    if scaling is None or scaling.kind == "ntk":
        return {"rope_theta": theta, "rope_scaling": None}
    fields: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        fields["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        fields |= {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "truncate": scaling.truncate,
        }
        if scaling.attention_factor is not None:
            fields["attention_factor"] = scaling.attention_factor
    return {"rope_theta": theta, "rope_scaling": fields}


def _ids(vocabulary: Vocabulary) -> dict[str, Any]:
    """The ids that a text begins and ends with, as Hugging Face's configurations have them."""
    ends = list(vocabulary.eos_ids)
    ids = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": vocabulary.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _shards(
    config: LlamaConfig, dtypes: dict[Entry, np.dtype[Any]], shard_bytes: int
) -> Iterator[Sequence[Entry]]:
    """Fills one file after another."""
    shard: list[Entry] = []
    size = 0
    for entry, dtype in dtypes.items():
        nbytes = _nbytes(config, entry, dtype)
        if shard and size + nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += nbytes
    yield shard


def _equal_shards(
    config: LlamaConfig, dtypes: dict[Entry, np.dtype[Any]], shards: int
) -> Iterator[Sequence[Entry]]:
    """Puts each tensor where its middle falls if all are laid end to end and cut in equal parts."""
    sizes = {entry: _nbytes(config, entry, dtype) for entry, dtype in dtypes.items()}
    ends = itertools.accumulate(sizes.values())
    total = sum(sizes.values())

    def part(item: tuple[tuple[Entry, int], int]) -> int:
        (_, size), end = item
        return int((2 * end - size) * shards // (2 * total))

    for _, group in itertools.groupby(zip(sizes.items(), ends, strict=True), part):
        yield [entry for (entry, _), _ in group]


def _header(config: LlamaConfig, shard: Sequence[Entry], dtypes: dict[Entry, np.dtype[Any]]) -> bytes:
    """A safetensors file's beginning: the header's length, and the header padded to 8 bytes."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard:
        end = offset + _nbytes(config, entry, dtypes[entry])
        described[entry.name] = {
            "dtype": _NAMES[dtypes[entry]],
            "shape": list(entry.leaf.stored_shape(config, "hf")),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _nbytes(config: LlamaConfig, entry: Entry, dtype: np.dtype[Any]) -> int:
    return int(np.prod(entry.leaf.stored_shape(config, "hf"), dtype=np.int64)) * dtype.itemsize


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
