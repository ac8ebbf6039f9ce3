"""A SentencePiece vocabulary taken apart, whatever file it came in: the form that exporters start from."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import TableTokenizer
from llama_jax.tokenizer.byte_level import is_byte_level, steps
from llama_jax.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceTokenizer,
    read_varint,
)
from llama_jax.tokenizer.tokenizer_json import BYTE_PIECE, LibraryTokenizer


@dataclasses.dataclass(frozen=True)
class SentencePieces:
    """A byte-pair vocabulary whose scores say which pair of pieces merges first.

    Attributes:
      pieces: by id.
      space_prefix: whether a space is put before every text.
    """

    pieces: Sequence[Piece]
    space_prefix: bool

    def merges(self) -> list[tuple[str, str]]:
        """The pairs of pieces that make a piece, the best score first.

        Of pairs with the same score SentencePiece takes the leftmost. For runs of one character, which
        share a score in Llama's own vocabulary, that is the pair with the longest left part.

        Raises:
          ValueError: if other pieces share a score, so that no order of the pairs does the same.
        """
        ids = {piece.text: token for token, piece in enumerate(self.pieces) if piece.kind == NORMAL}
        found = []
        of_score: dict[float, str] = {}
        for text, token in ids.items():
            pairs = [pair for pair in _splits(text) if ids.keys() >= set(pair)]
            score = self.pieces[token].score
            other = of_score.setdefault(score, text) if pairs else text
            if other != text and len({*other, *text}) > 1:
                raise ValueError(f"gives {other!r} and {text!r} the same score")
            found += [(-score, -len(left), left, right) for left, right in pairs]
        return [(left, right) for *_, left, right in sorted(found)]


def sentence_pieces(tokenizer: TableTokenizer, reader: str) -> SentencePieces:
    """Takes a vocabulary apart into pieces with scores.

    Args:
      tokenizer: from a SentencePiece model, or from a tokenizer.json or GGUF file that says the same.
      reader: what programs that encode by pieces and scores alone will read, for the message.

    Raises:
      TokenizerError: if the vocabulary says more than pieces and scores, so that such programs would
        encode text differently.
    """
    try:
        if isinstance(tokenizer, SentencePieceTokenizer):
            return _from_model(tokenizer.proto)
        if isinstance(tokenizer, LibraryTokenizer):
            return _from_json(tokenizer.library())
    except ValueError as error:
        raise TokenizerError(
            f"the vocabulary of {tokenizer.origin} {error}, which {reader} has no way to say: programs that "
            "read it would encode text differently; write another format"
        ) from None
    raise TokenizerError(f"{tokenizer.origin} is a {type(tokenizer).__name__}, which no file can hold")


def _from_model(proto: bytes) -> SentencePieces:
    """Reads a model's buffer (google/sentencepiece, src/sentencepiece_model.proto)."""
    pieces = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(proto):
        if number == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if trainer.get(3, 1) != 2:
        raise ValueError("is no byte-pair one")
    if normalizer.get(2):
        raise ValueError("normalises text before encoding it")
    if normalizer.get(4, 1):
        raise ValueError("leaves out spaces that repeat")
    if not normalizer.get(5, 1) or trainer.get(24):
        raise ValueError("does not mark a word's beginning with a space")
    return SentencePieces(pieces, bool(normalizer.get(3, 1)))


def _from_json(library: Tokenizer) -> SentencePieces:
    """Reads what Hugging Face's conversion makes of a model: scores become the order of the merges."""
    if is_byte_level(library):
        raise ValueError("is a byte-level one")
    content = json.loads(library.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"is a {model['type']} one")
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "ignore_merges")):
        raise ValueError("has rules of its own for words")
    space_prefix = _space_prefix(content)
    merges = [(left, right) for left, right in model["merges"]]
    ranks = _ranks(merges)
    names = {token: text for text, token in model["vocab"].items()}
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    pieces = []
    for token in range(max([*names, *added]) + 1):
        text = added[token]["content"] if token in added else names.get(token, f"[PAD{token}]")
        kind = NORMAL if token in names else UNUSED
        if text == model["unk_token"]:
            kind = UNKNOWN
        elif token in added:
            kind = CONTROL if added[token]["special"] else USER_DEFINED
        elif model["byte_fallback"] and BYTE_PIECE.fullmatch(text):
            kind = BYTE
        rank = ranks.get(text)
        if rank is None and kind == NORMAL:  # as SentencePiece's trainer does it: characters come last
            rank = ranks[text] = len(ranks)
        pieces.append(Piece(text, -float(rank) if rank is not None and kind == NORMAL else 0.0, kind))
    if all(piece.kind != UNKNOWN for piece in pieces):
        raise ValueError("has no unknown token")
    normal = {piece.text for piece in pieces if piece.kind == NORMAL}
    given = set(merges)
    for text in normal:
        for pair in _splits(text):
            if normal.issuperset(pair) and pair not in given:
                raise ValueError(f"does not merge {pair[0]!r} and {pair[1]!r}, though {text!r} is a piece")
    return SentencePieces(pieces, space_prefix)


def _space_prefix(content: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before a text, and does nothing else to it.

    transformers 5 writes Metaspace, which puts none before a text that has one already. SentencePiece does,
    and is what the model was trained with.
    """
    normal, cut = list(steps(content["normalizer"])), list(steps(content["pre_tokenizer"]))
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not cut and normal in ([prepend, replace], [replace]):
        return len(normal) == 2
    if not normal and len(cut) == 1 and cut[0]["type"] == "Metaspace" and not cut[0].get("split", True):
        return bool(cut[0].get("prepend_scheme", "always") != "never")
    raise ValueError("normalises or cuts text before encoding it")


def _ranks(merges: Sequence[tuple[str, str]], tied: frozenset[str] = frozenset()) -> dict[str, int]:
    """The order in which merges make pieces; runs of a character in `tied` all come at once."""
    ranks: dict[str, int] = {}
    groups: dict[str, int] = {}
    last = ""
    again = set()
    for left, right in merges:
        text = left + right
        group = text[0] if tied.issuperset(text) and len(set(text)) == 1 else text
        if group in groups and group != last:
            again.add(text)
        ranks[text] = groups.setdefault(group, len(groups))
        last = group
    if not again:
        return ranks
    if tied or any(len(set(text)) > 1 for text in again):
        raise ValueError(f"merges {min(again)!r} at several ranks")
    return _ranks(merges, frozenset(text[0] for text in again))


def _splits(text: str) -> Iterator[tuple[str, str]]:
    for i in range(1, len(text)):
        yield text[:i], text[i:]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the fields of a protocol buffer that a library has accepted: ints, or bytes."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        if tag & 7 == 0:
            value, at = read_varint(data, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:
            size, at = read_varint(data, at)
        yield tag >> 3, data[at : at + size]
        at += size
