"""A vocabulary as a trie of the bytes that its tokens stand for."""

from __future__ import annotations

import dataclasses
import hashlib
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llama_jax.errors import GrammarError
from llama_jax.tokenizer.base import BaseTokenizer, Tokenizer


class Level(NamedTuple):
    """The prefixes of one length: n nodes.

    Attributes:
      parent: int [n], each node's place in the level above.
      byte: uint8 [n], its last byte.
      tokens: int [m], the ids of the tokens that end at this level.
      ends: int [m], the nodes that they are.
    """

    parent: np.ndarray
    byte: np.ndarray
    tokens: np.ndarray
    ends: np.ndarray


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens that are text.

    Control tokens, the unknown token, end-of-sequence tokens and ids that stand for nothing are none.

    Attributes:
      size: V.
      pieces: the bytes of each id, empty for those that are no text.
      levels: the trie of the pieces.
      first_levels: the trie of the pieces at the start of a text, where SentencePiece drops one space; None
        where they are the same.
      drops_space: whether a token that is only that space may come at the start.
      digest: of the pieces.
    """

    size: int
    pieces: Sequence[bytes]
    levels: list[Level]
    first_levels: list[Level] | None
    drops_space: bool
    digest: str


_CACHE: weakref.WeakKeyDictionary[Tokenizer, Vocabulary] = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The vocabulary of a tokenizer of any format; kept as long as the tokenizer is.

    Raises:
      GrammarError: for a tokenizer that is not llama_jax's.
    """
    if tokenizer not in _CACHE:
        _CACHE[tokenizer] = _read(tokenizer)
    return _CACHE[tokenizer]


def _read(tokenizer: Tokenizer) -> Vocabulary:
    if not isinstance(tokenizer, BaseTokenizer):
        raise GrammarError(
            f"a {type(tokenizer).__name__} has no table of bytes; give a tokenizer of load_tokenizer"
        )
    table, none = tokenizer.table, {*tokenizer.special_tokens.values(), *tokenizer.eos_ids}
    none |= {id for id in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.pad_id) if id is not None}
    pieces = [b"" if id in none else piece for id, piece in enumerate(table.pieces)]
    first = None
    if table.space_prefixed:
        first = trie([piece[id in table.space_prefixed :] for id, piece in enumerate(pieces)])
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(len(piece).to_bytes(4, "little") + piece)
    return Vocabulary(
        size=tokenizer.vocab_size,
        pieces=pieces,
        levels=trie(pieces),
        first_levels=first,
        # With `strip_all` it changes nothing, and could come for ever.
        drops_space=first is not None and not table.strip_all,
        digest=digest.hexdigest(),
    )


def trie(pieces: Sequence[bytes]) -> list[Level]:
    """The trie of the pieces that are not empty, one level for each byte."""
    data = np.frombuffer(b"".join(pieces), np.uint8)
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    offsets = np.cumsum(lengths) - lengths
    node, levels = np.zeros(len(pieces), np.int64), []
    for depth in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > depth)
        keys, node[longer] = np.unique(
            node[longer] * 256 + data[offsets[longer] + depth], return_inverse=True
        )
        tokens = np.flatnonzero(lengths == depth + 1)
        levels.append(Level(keys >> 8, (keys & 255).astype(np.uint8), tokens, node[tokens]))
    return levels
