"""Pads a vocabulary with control tokens, to match a model whose embedding has more rows."""

from __future__ import annotations

import dataclasses

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import BaseTokenizer, DecodeTable, Tokenizer, TokenizerSettings
from llama_jax.tokenizer.sentencepiece_model import (
    CONTROL,
    Piece,
    SentencePieceTokenizer,
    decode_table,
    load_model,
    with_pieces,
)
from llama_jax.tokenizer.tokenizer_json import HuggingFaceTokenizer


def pad_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Appends control tokens [PADn] to a vocabulary until its size is `vocab_size`.

    Raises:
      TokenizerError: if the vocabulary is larger already, or its type cannot be extended.
    """
    if tokenizer.vocab_size == vocab_size:
        return tokenizer
    if tokenizer.vocab_size > vocab_size or not isinstance(tokenizer, BaseTokenizer):
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; give the model's "
            "tokenizer with tokenizer (--tokenizer)"
        )
    names = [f"[PAD{token}]" for token in range(tokenizer.vocab_size, vocab_size)]
    settings = TokenizerSettings(
        **{field.name: getattr(tokenizer, field.name) for field in dataclasses.fields(TokenizerSettings)}
    )
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = load_model(
            with_pieces(tokenizer.proto, (Piece(name, 0.0, CONTROL) for name in names)), tokenizer.origin
        )
        return SentencePieceTokenizer(model, decode_table(model), settings, tokenizer.origin)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise TokenizerError(f"a {type(tokenizer).__name__} cannot be extended; give a larger vocabulary")
    backend = tokenizer.copy_backend()
    backend.add_special_tokens(names)
    if backend.get_vocab_size() != vocab_size:
        raise TokenizerError(f"{tokenizer.origin}: has tokens named [PADn] already; give a larger vocabulary")
    old = tokenizer.table
    extended = [*old.pieces, *map(str.encode, names)]
    added = {name: token for token, name in enumerate(names, tokenizer.vocab_size)}
    table: DecodeTable = dataclasses.replace(old, pieces=extended, special={**old.special, **added})
    padded = HuggingFaceTokenizer(backend, table, settings, tokenizer.origin, tokenizer.gguf_pre)
    padded.check_text = tokenizer.check_text
    return padded
