"""Reads prefixes in the format of Hugging Face's PEFT (PREFIX_TUNING): keys and values in one matrix.

`prompt_embeddings` is [P, L * 2 * K * H]: for each virtual token and layer the keys and then the values, as
in a KV cache. PEFT stores a prefix trained through an MLP (prefix_projection) as the MLP's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from llama_jax.adapters.prefix import Prefix
from llama_jax.errors import CheckpointError
from llama_jax.weights import adapter_head
from llama_jax.weights.adapter_file import read_f32, read_header, weights_path
from llama_jax.weights.json_fields import JsonFields
from llama_jax.weights.peft_fields import check_fields
from llama_jax.weights.source import format_list, quote

PROMPT_EMBEDDINGS = "prompt_embeddings"

_SIZES = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
_KNOWN = {*_SIZES, "num_transformer_submodules", "encoder_hidden_size", "prefix_projection", "init_weights"}


def read_prefix(config_path: Path, config: Mapping[str, Any]) -> tuple[Prefix, dict[str, Any]]:
    """Reads a prefix.

    Args:
      config_path: its adapter_config.json; the weights are in the same directory.
      config: the contents of that file.

    Returns:
      The settings, and the adapter's tree for `prefix.attach`: f32, layers stacked.

    Raises:
      CheckpointError: if a file is missing or malformed, the adapter uses an unsupported feature, or the
        tensor is missing, of the wrong shape, or not the only one.
    """
    fields = JsonFields(config_path, config)
    adapter_head.check_task(config_path, config)
    adapter_head.check_only_head_saved(config_path, config)
    if config.get("num_transformer_submodules") not in (None, 1):
        submodules = quote(str(config["num_transformer_submodules"]))
        raise fields.error(f"num_transformer_submodules is {submodules}; a Llama has 1")
    check_fields(config_path, config, _KNOWN)
    length, layers, heads, width = (fields.integer(key, minimum=1) for key in _SIZES)
    if width % heads:
        raise fields.error(f"token_dim is {width}, not a multiple of num_attention_heads {heads}")
    file = weights_path(config_path)
    stored = adapter_head.exclude_head(config, read_header(file))
    if set(stored) != {PROMPT_EMBEDDINGS}:
        names = format_list([quote(name) for name in stored], 4) or "no tensor"
        raise CheckpointError(f"{file}: has {names}; a prefix is one tensor, {PROMPT_EMBEDDINGS}")
    info, shape = stored[PROMPT_EMBEDDINGS], (length, layers * 2 * width)
    if info.shape != shape:
        raise CheckpointError(
            f"{file}: {PROMPT_EMBEDDINGS} {list(info.shape)} should be {list(shape)} according to "
            f"{config_path.name}; use the files that were saved together"
        )
    both = read_f32(PROMPT_EMBEDDINGS, info).reshape(length, layers, 2, heads, width // heads)
    keys, values = (jnp.asarray(both[:, :, i].transpose(1, 2, 0, 3)) for i in (0, 1))
    return Prefix(length), {"layers": {"attention": {"k": keys, "v": values}}}
