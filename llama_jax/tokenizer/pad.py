"""A vocabulary with tokens at its end that no text becomes: what a model's added rows are called."""

from __future__ import annotations

import dataclasses

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import Roles, Table, TableTokenizer, Tokenizer
from llama_jax.tokenizer.sentencepiece_model import (
    SentencePieceTokenizer,
    load_model,
    table,
    with_control_pieces,
)
from llama_jax.tokenizer.tokenizer_json import LibraryTokenizer


def pad(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """`tokenizer` with control tokens [PADn] added until it has `vocab_size` of them.

    Raises:
      TokenizerError: if it has more already, or is of a kind that cannot be added to.
    """
    if tokenizer.vocab_size == vocab_size:
        return tokenizer
    if tokenizer.vocab_size > vocab_size or not isinstance(tokenizer, TableTokenizer):
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {vocab_size}; give the one that "
            "belongs to it with tokenizer (--tokenizer)"
        )
    names = [f"[PAD{token}]" for token in range(tokenizer.vocab_size, vocab_size)]
    roles = Roles(**{field.name: getattr(tokenizer, field.name) for field in dataclasses.fields(Roles)})
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = load_model(with_control_pieces(tokenizer.proto, names), tokenizer.origin)
        return SentencePieceTokenizer(model, table(model), roles, tokenizer.origin)
    if not isinstance(tokenizer, LibraryTokenizer):
        raise TokenizerError(f"a {type(tokenizer).__name__} cannot be added to; give a longer vocabulary")
    library = tokenizer.library()
    library.add_special_tokens(names)
    if library.get_vocab_size() != vocab_size:
        raise TokenizerError(
            f"{tokenizer.origin}: has tokens called [PADn] already; give a longer vocabulary"
        )
    old = tokenizer.table
    pieces = [*old.pieces, *map(str.encode, names)]
    added = {name: old_id for old_id, name in enumerate(names, tokenizer.vocab_size)}
    wide: Table = dataclasses.replace(old, pieces=pieces, special={**old.special, **added})
    return LibraryTokenizer(library, wide, roles, tokenizer.origin, tokenizer.pre)
