"""Fits a vocabulary to a model whose embedding table has another number of rows.

Embeddings are often padded to a multiple of 64 or more, and vocabularies often hold added tokens that the
model was never resized for. Both load in transformers.
"""

from __future__ import annotations

import copy
import dataclasses

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import BaseTokenizer, Tokenizer


def fit_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Returns a tokenizer with one id for each row of an embedding table.

    Rows without a token get ids that decode to nothing and are never encoded (`BaseTokenizer.unused_ids`).
    Added tokens without a row are left out: a text that holds one cannot be encoded.

    Raises:
      TokenizerError: if other tokens have no row either, so that it is the vocabulary of another model.
    """
    if tokenizer.vocab_size == vocab_size:
        return tokenizer
    if not isinstance(tokenizer, BaseTokenizer):
        raise TokenizerError(f"a {type(tokenizer).__name__} cannot be fitted; use load_tokenizer")
    table, size = tokenizer.table, tokenizer.vocab_size
    if size > vocab_size and not tokenizer.added_ids.issuperset(range(vocab_size, size)):
        raise TokenizerError(
            f"{tokenizer.origin} has {size} tokens and the model only {vocab_size}; give the model's own "
            "tokenizer with tokenizer (--tokenizer)"
        )
    fitted = copy.copy(tokenizer)
    fitted.table = dataclasses.replace(
        table,
        pieces=[*table.pieces[:vocab_size], *[b""] * (vocab_size - size)],
        special={name: token for name, token in table.special.items() if token < vocab_size},
    )
    fitted.vocab_size, fitted.special_tokens = vocab_size, fitted.table.special
    fitted.fitted_from = tokenizer
    fitted.unused_ids = range(min(size, vocab_size), vocab_size)
    fitted.eos_ids = tuple(token for token in tokenizer.eos_ids if token < vocab_size)
    for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
        token = getattr(tokenizer, name)
        setattr(fitted, name, token if token is not None and token < vocab_size else None)
    return fitted
