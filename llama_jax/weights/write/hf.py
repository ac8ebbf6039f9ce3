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
from llama_jax.weights.hf import problem_type
from llama_jax.weights.hf_families import Family, family_fields, family_of
from llama_jax.weights.names import Entry, entries
from llama_jax.weights.source import DTYPE_NAMES
from llama_jax.weights.tensors import Tensors
from llama_jax.weights.write.cast import cast
from llama_jax.weights.write.plan import Blob, Plan, Region
from llama_jax.weights.write.small_files import safetensors_header
from llama_jax.weights.write.vocabulary import Vocabulary

SHARD_BYTES = 5_000_000_000  # transformers' default for `save_pretrained`


def plan_hf(
    tensors: Tensors,
    dtype: np.dtype[Any] | None,
    vocabulary: Vocabulary,
    *,
    shard_bytes: int = SHARD_BYTES,
    shards: int | None = None,
) -> Plan:
    """Plans a directory like that of Hugging Face's `save_pretrained`.

    Args:
      tensors: the tensors to write.
      dtype: dtype of all tensors; None keeps each tensor's own.
      vocabulary: the tokenizer, whose files are included.
      shard_bytes: maximum size of a shard in bytes; a larger tensor gets its own shard.
      shards: split into at most this many shards of about equal size instead.

    Raises:
      ConfigError: if no class in transformers computes the model.
    """
    config, family = tensors.config, family_of(tensors.config)
    dtypes = {entry: dtype or tensors.dtype(entry.leaf, entry.layer) for entry in layer_by_layer(config)}
    if shards is None:
        groups = list(_shards_by_size(config, dtypes, shard_bytes))
    else:
        groups = list(_equal_shards(config, dtypes, shards))
    files, blobs, regions, weight_map = {}, [], [], {}
    for number, group in enumerate(groups, 1):
        file = "model.safetensors"
        if len(groups) > 1:
            file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        header = _header(config, group, dtypes)
        blobs.append(Blob(file, 0, header))
        offset = len(header)
        for entry in group:
            nbytes = _nbytes(config, entry, dtypes[entry])
            encode = functools.partial(cast, dtype=dtypes[entry])
            regions.append(Region(file, offset, nbytes, entry.leaf, entry.layer, encode))
            offset += nbytes
            weight_map[entry.name] = file
        files[file] = offset
    extras = dict(vocabulary.files)
    torch_dtype = dtype or dtypes[next(iter(dtypes))]
    extras["config.json"] = _json(
        config_fields(config, vocabulary, family) | {"torch_dtype": torch_dtype.name}
    )
    if not config.labels:
        extras["generation_config.json"] = _json(
            {"_from_model_config": True} | _special_token_ids(vocabulary)
        )
    if len(groups) > 1:
        total = sum(region.nbytes for region in regions)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        extras["model.safetensors.index.json"] = _json(index)
    return Plan("hf", False, files, blobs, extras, regions)


def layer_by_layer(config: LlamaConfig) -> list[Entry]:
    """All tensors in the order of the forward pass: embedding, layers, final norm, output projection."""
    embedding, *rest = entries(config, "hf")
    layers = [entry for entry in rest if entry.layer is not None]
    last = [entry for entry in rest if entry.layer is None]
    return [embedding, *sorted(layers, key=lambda entry: entry.layer or 0), *last]


def config_fields(config: LlamaConfig, vocabulary: Vocabulary, family: Family) -> dict[str, Any]:
    """The fields of config.json: those that `read_config` reads, and those that other programs need."""
    fields = {
        "architectures": [family.classifier if config.labels else family.language_model],
        "model_type": family.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        **_rope_fields(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
    }
    fields |= family_fields(config, family)
    if family.model_type != "llama":  # the defaults of others may be ids outside the vocabulary
        fields |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return fields | _classifier_fields(config) | _special_token_ids(vocabulary)


def _classifier_fields(config: LlamaConfig) -> dict[str, Any]:
    if not config.labels:
        return {}
    return {
        "id2label": {str(i): name for i, name in enumerate(config.labels)},
        "label2id": {name: i for i, name in enumerate(config.labels)},
        "problem_type": problem_type(len(config.labels)),
    }


def _rope_fields(config: LlamaConfig) -> dict[str, Any]:
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


def _special_token_ids(vocabulary: Vocabulary) -> dict[str, Any]:
    """BOS, EOS and padding ids in the form of Hugging Face's configurations."""
    eos_ids = list(vocabulary.eos_ids)
    ids = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids or None,
        "pad_token_id": vocabulary.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _shards_by_size(
    config: LlamaConfig, dtypes: dict[Entry, np.dtype[Any]], shard_bytes: int
) -> Iterator[Sequence[Entry]]:
    """Fills one shard after another up to `shard_bytes`."""
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
    """Cuts the sequence of tensors into equal parts; each tensor goes to the part with its midpoint."""
    sizes = {entry: _nbytes(config, entry, dtype) for entry, dtype in dtypes.items()}
    ends = itertools.accumulate(sizes.values())
    total = sum(sizes.values())

    def shard_index(item: tuple[tuple[Entry, int], int]) -> int:
        (_, size), end = item
        return int((2 * end - size) * shards // (2 * total))

    for _, group in itertools.groupby(zip(sizes.items(), ends, strict=True), shard_index):
        yield [entry for (entry, _), _ in group]


def _header(config: LlamaConfig, shard: Sequence[Entry], dtypes: dict[Entry, np.dtype[Any]]) -> bytes:
    return safetensors_header(
        (
            entry.name,
            DTYPE_NAMES[dtypes[entry]],
            entry.leaf.stored_shape(config, "hf"),
            _nbytes(config, entry, dtypes[entry]),
        )
        for entry in shard
    )


def _nbytes(config: LlamaConfig, entry: Entry, dtype: np.dtype[Any]) -> int:
    return int(np.prod(entry.leaf.stored_shape(config, "hf"), dtype=np.int64)) * dtype.itemsize


def _json(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()
