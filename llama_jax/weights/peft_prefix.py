"""Reads prefixes in the format of Hugging Face's PEFT: its PREFIX_TUNING, keys and values in one matrix.

`prompt_embeddings` is [P, L * 2 * K * H]: of each virtual token the keys and then the values of each layer,
as they stand in a cache. A prefix that PEFT trained through an MLP (prefix_projection) is stored without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from llama_jax.adapters.prefix import Prefix
from llama_jax.errors import CheckpointError
from llama_jax.weights import adapter_head
from llama_jax.weights.peft import check_known, tensors_file
from llama_jax.weights.safetensors import read_safetensors_header
from llama_jax.weights.source import brief, quote, read_f32

TENSOR = "prompt_embeddings"

_SIZES = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
_KNOWN = {*_SIZES, "num_transformer_submodules", "encoder_hidden_size", "prefix_projection", "init_weights"}


def read_prefix(description: Path, fields: Mapping[str, Any]) -> tuple[Prefix, dict[str, Any]]:
    """Reads a prefix.

    Args:
      description: its adapter_config.json; the tensor lies beside it.
      fields: what that holds.

    Returns:
      Its settings, and its tree as `prefix.attach` takes it: f32, layers stacked.

    Raises:
      CheckpointError: if a file is missing or malformed, if a field says what cannot be done, or if the
        tensor is missing, not alone or of the wrong shape.
    """

    def error(what: str) -> CheckpointError:
        return CheckpointError(f"{description}: {what}")

    adapter_head.check_task(description, fields)
    if fields.get("num_transformer_submodules") not in (None, 1):
        raise error(
            f"num_transformer_submodules is {quote(str(fields['num_transformer_submodules']))}; a Llama has 1"
        )
    check_known(description, fields, _KNOWN)
    for key in _SIZES:
        if type(fields.get(key)) is not int or not 0 < fields[key] < 1 << 31:
            raise error(f"{key} is {quote(str(fields.get(key)))}; it must be a whole number, at least 1")
    length, layers, heads, width = (fields[key] for key in _SIZES)
    if width % heads:
        raise error(f"token_dim is {width}, which {heads} num_attention_heads do not divide")
    file = tensors_file(description)
    stored = adapter_head.without_head(fields, read_safetensors_header(file))
    if set(stored) != {TENSOR}:
        held = brief([quote(name) for name in stored], 4) or "nothing"
        raise CheckpointError(f"{file}: holds {held}; a prefix is one tensor, {TENSOR}")
    want = (length, layers * 2 * width)
    if stored[TENSOR].shape != want:
        raise CheckpointError(
            f"{file}: {TENSOR} {list(stored[TENSOR].shape)} should be {list(want)} by {description.name}; "
            "use those saved together"
        )
    both = read_f32(TENSOR, stored[TENSOR]).reshape(length, layers, 2, heads, width // heads)
    keys, values = (jnp.asarray(both[:, :, i].transpose(1, 2, 0, 3)) for i in (0, 1))
    return Prefix(length), {"layers": {"attention": {"k": keys, "v": values}}}
