"""Exports a tokenizer as GGUF metadata with which llama.cpp encodes text identically.

Keys are those of the GGUF specification, ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import END_TOKENS, BaseTokenizer
from llama_jax.tokenizer.byte_level import is_byte_level, match_pre_tokenizer
from llama_jax.tokenizer.gguf_vocab import NO_TOKEN, PREFIX
from llama_jax.tokenizer.pieces import extract_pieces
from llama_jax.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from llama_jax.tokenizer.sentencepiece_model import CONTROL, NORMAL, UNUSED, USER_DEFINED
from llama_jax.tokenizer.tokenizer_json import HuggingFaceTokenizer


def gguf_fields(tokenizer: BaseTokenizer) -> dict[str, Any]:
    """Returns the metadata fields: str, bool, int, list of str, or NumPy array.

    Raises:
      TokenizerError: if llama.cpp would encode text differently.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer) and is_byte_level(tokenizer.copy_backend()):
        fields, required = _byte_level(tokenizer), frozenset[str]()
    else:  # llama.cpp's defaults for absent keys are 1, 2 and 0
        fields, required = _sentencepiece(tokenizer), frozenset(("bos", "eos", "unknown"))
    special_ids = {
        "bos": next(iter(tokenizer.prefix_ids), tokenizer.bos_id),  # what llama.cpp prepends
        "eos": tokenizer.eos_id,
        "unknown": tokenizer.unk_id,
        "padding": tokenizer.pad_id,
    }
    # End tokens that readers do not recognize by name.
    others = (token for token in tokenizer.eos_ids if token != tokenizer.eos_id)
    unnamed = (token for token in others if tokenizer.id_to_token(token) not in END_TOKENS)
    special_ids |= dict(zip(("eot", "eom"), unnamed, strict=False))
    for name, token in special_ids.items():
        if token is not None:
            fields[f"{name}_token_id"] = token
        elif name in required:
            fields[f"{name}_token_id"] = NO_TOKEN
    fields["add_bos_token"] = tokenizer.add_bos
    if tokenizer.suffix_ids:
        fields["add_eos_token"] = True
    metadata = {f"{PREFIX}{key}": value for key, value in fields.items()}
    if tokenizer.chat_template is not None:
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata


def _sentencepiece(tokenizer: BaseTokenizer) -> dict[str, Any]:
    vocabulary = extract_pieces(tokenizer, "GGUF")
    return {
        "model": "llama",
        "tokens": [piece.text for piece in vocabulary.pieces],
        "scores": np.array([piece.score for piece in vocabulary.pieces], np.float32),
        "token_type": np.array([piece.kind for piece in vocabulary.pieces], np.int32),
        "add_space_prefix": vocabulary.space_prefix,
    }


def _byte_level(tokenizer: HuggingFaceTokenizer) -> dict[str, Any]:
    backend = tokenizer.copy_backend()
    pre = tokenizer.gguf_pre or match_pre_tokenizer(backend)
    if pre is None:
        raise TokenizerError(
            f"the vocabulary of {tokenizer.origin} has a pre-tokenizer without a GGUF name (known are "
            f"{', '.join(PRE_TOKENIZERS)}), so llama.cpp would encode text differently; write another format"
        )
    added = backend.get_added_tokens_decoder()
    special = frozenset(tokenizer.special_tokens.values())
    tokens, kinds = [], []
    for token in range(tokenizer.vocab_size):
        text = tokenizer.id_to_token(token)
        tokens.append(text or f"[PAD{token}]")
        kind = CONTROL if token in special else USER_DEFINED if token in added else NORMAL
        kinds.append(kind if text else UNUSED)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.array(kinds, np.int32),
        "merges": [" ".join(merge) for merge in merges],
    }
