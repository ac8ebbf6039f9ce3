"""A loaded tokenizer as a GGUF file's metadata, such that llama.cpp encodes text the same.

Keys are those of the GGUF specification, ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import END_TOKENS, TableTokenizer
from llama_jax.tokenizer.byte_level import PRE_TOKENIZERS, is_byte_level, recognise
from llama_jax.tokenizer.gguf_vocab import NO_TOKEN, PREFIX
from llama_jax.tokenizer.pieces import sentence_pieces
from llama_jax.tokenizer.sentencepiece_model import CONTROL, NORMAL, UNUSED, USER_DEFINED
from llama_jax.tokenizer.tokenizer_json import LibraryTokenizer


def gguf_fields(tokenizer: TableTokenizer) -> dict[str, Any]:
    """Returns the metadata fields: str, bool, int, list of str, or NumPy array.

    Raises:
      TokenizerError: if llama.cpp would encode text differently.
    """
    if isinstance(tokenizer, LibraryTokenizer) and is_byte_level(tokenizer.library()):
        fields, required = _byte_level(tokenizer), frozenset[str]()
    else:  # where nothing stands, llama.cpp takes 1, 2 and 0
        fields, required = _sentencepiece(tokenizer), frozenset(("bos", "eos", "unknown"))
    roles = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "unknown": tokenizer.unk_id,
        "padding": tokenizer.pad_id,
    }
    # Ends that a reader does not know by name.
    others = (token for token in tokenizer.eos_ids if token != tokenizer.eos_id)
    unnamed = (token for token in others if tokenizer.spelling(token) not in END_TOKENS)
    roles |= dict(zip(("eot", "eom"), unnamed, strict=False))
    for role, token in roles.items():
        if token is not None:
            fields[f"{role}_token_id"] = token
        elif role in required:
            fields[f"{role}_token_id"] = NO_TOKEN
    fields["add_bos_token"] = tokenizer.add_bos
    keyed = {f"{PREFIX}{key}": value for key, value in fields.items()}
    if tokenizer.chat_template is not None:
        keyed["tokenizer.chat_template"] = tokenizer.chat_template
    return keyed


def _sentencepiece(tokenizer: TableTokenizer) -> dict[str, Any]:
    vocabulary = sentence_pieces(tokenizer, "GGUF")
    return {
        "model": "llama",
        "tokens": [piece.text for piece in vocabulary.pieces],
        "scores": np.array([piece.score for piece in vocabulary.pieces], np.float32),
        "token_type": np.array([piece.kind for piece in vocabulary.pieces], np.int32),
        "add_space_prefix": vocabulary.space_prefix,
    }


def _byte_level(tokenizer: LibraryTokenizer) -> dict[str, Any]:
    library = tokenizer.library()
    pre = tokenizer.pre or recognise(library)
    if pre is None:
        raise TokenizerError(
            f"the vocabulary of {tokenizer.origin} cuts text before merging in a way that GGUF has no name "
            f"for here (known are {', '.join(PRE_TOKENIZERS)}), so that llama.cpp would cut it differently; "
            "write another format"
        )
    added = library.get_added_tokens_decoder()
    special = frozenset(tokenizer.special_tokens.values())
    tokens, kinds = [], []
    for token in range(tokenizer.vocab_size):
        text = tokenizer.spelling(token)
        tokens.append(text or f"[PAD{token}]")
        kind = CONTROL if token in special else USER_DEFINED if token in added else NORMAL
        kinds.append(kind if text else UNUSED)
    merges = json.loads(library.to_str())["model"]["merges"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": np.array(kinds, np.int32),
        "merges": [" ".join(merge) for merge in merges],
    }
