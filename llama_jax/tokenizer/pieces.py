"""Extracts SentencePiece pieces and scores from a tokenizer of any format, for the exporters."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import BaseTokenizer
from llama_jax.tokenizer.byte_level import is_byte_level, pipeline_steps
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
from llama_jax.tokenizer.tokenizer_json import BYTE_PIECE, HuggingFaceTokenizer


@dataclasses.dataclass(frozen=True)
class SentencePieces:
    """A BPE vocabulary with merge priorities as scores.

    Attributes:
      pieces: by id.
      space_prefix: whether a space is prepended to every text.
    """

    pieces: Sequence[Piece]
    space_prefix: bool

    def merges(self) -> list[tuple[str, str]]:
        """Returns the equivalent merges of a tokenizer.json: pairs of pieces, the best score first.

        Among pairs with the same score SentencePiece merges the leftmost. For runs of one character, which
        share a score in Llama's vocabulary, that is the pair with the longest left part.

        Raises:
          ValueError: if other pieces share a score, so that no order of the pairs is equivalent.
        """
        ids = {piece.text: token for token, piece in enumerate(self.pieces) if piece.kind == NORMAL}
        merges = []
        text_by_score: dict[float, str] = {}
        for text, token in ids.items():
            pairs = [pair for pair in _splits(text) if ids.keys() >= set(pair)]
            score = self.pieces[token].score
            other = text_by_score.setdefault(score, text) if pairs else text
            if other != text and len({*other, *text}) > 1:
                raise ValueError(f"gives {other!r} and {text!r} the same score")
            merges += [(-score, -len(left), left, right) for left, right in pairs]
        return [(left, right) for *_, left, right in sorted(merges)]


def extract_pieces(tokenizer: BaseTokenizer, target: str) -> SentencePieces:
    """Converts a vocabulary to pieces with scores.

    Args:
      tokenizer: from a SentencePiece model, or from an equivalent tokenizer.json or GGUF file.
      target: name of the target format, for the error message.

    Raises:
      TokenizerError: if pieces and scores alone do not determine the encoding, so that programs that read
        the target format would encode text differently.
    """
    try:
        if isinstance(tokenizer, SentencePieceTokenizer):
            return _from_proto(tokenizer.proto)
        if isinstance(tokenizer, HuggingFaceTokenizer):
            return _from_json(tokenizer.copy_backend(), tokenizer.vocab_size)
    except ValueError as error:
        raise TokenizerError(
            f"the vocabulary of {tokenizer.origin} {error}, which {target} cannot represent: programs that "
            "read it would encode text differently; write another format"
        ) from None
    raise TokenizerError(f"{tokenizer.origin}: a {type(tokenizer).__name__} cannot be exported")


def _from_proto(proto: bytes) -> SentencePieces:
    """Reads a serialized model (google/sentencepiece, src/sentencepiece_model.proto)."""
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
        raise ValueError("is not BPE")
    if normalizer.get(2):
        raise ValueError("normalizes text before encoding it")
    if normalizer.get(4, 1):
        raise ValueError("removes extra whitespace")
    if not normalizer.get(5, 1) or trainer.get(24):
        raise ValueError("does not represent spaces as a prefix of words")
    return SentencePieces(pieces, bool(normalizer.get(3, 1)))


def _from_json(backend: Tokenizer, vocab_size: int) -> SentencePieces:
    """Reads Hugging Face's conversion of a model, where scores have become the order of the merges."""
    if is_byte_level(backend):
        raise ValueError("is byte-level")
    content = json.loads(backend.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ValueError(f"is of type {model['type']}")
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "ignore_merges")):
        raise ValueError("has dropout, a subword prefix or ignore_merges")
    space_prefix = _space_prefix(content)
    merges = [(left, right) for left, right in model["merges"]]
    ranks = _ranks(merges)
    names = {token: text for text, token in model["vocab"].items()}
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    for token, entry in added.items():
        if backend.id_to_token(token) != entry["content"]:  # it is matched with the space before it
            raise ValueError(f"has the added word {entry['content']!r}, which takes the space before it")
    pieces = []
    for token in range(min(max([*names, *added]) + 1, vocab_size)):
        text = added[token]["content"] if token in added else names.get(token, f"[PAD{token}]")
        kind = NORMAL if token in names else UNUSED
        if text == model["unk_token"]:
            kind = UNKNOWN
        elif token in added:
            kind = CONTROL if added[token]["special"] else USER_DEFINED
        elif model["byte_fallback"] and BYTE_PIECE.fullmatch(text):
            kind = BYTE
        rank = ranks.get(text)
        if rank is None and kind == NORMAL:  # single characters are last, as in SentencePiece's trainer
            rank = ranks[text] = len(ranks)
        pieces.append(Piece(text, -float(rank) if rank is not None and kind == NORMAL else 0.0, kind))
    if all(piece.kind != UNKNOWN for piece in pieces):
        raise ValueError("has no unknown token")
    normal = {piece.text for piece in pieces if piece.kind == NORMAL}
    known = set(merges)
    for text in normal:
        for pair in _splits(text):
            if normal.issuperset(pair) and pair not in known:
                raise ValueError(f"has the piece {text!r} but no merge of {pair[0]!r} and {pair[1]!r}")
    return SentencePieces(pieces, space_prefix)


def _space_prefix(content: Mapping[str, Any]) -> bool:
    """Returns whether a tokenizer.json prepends a space to every text.

    transformers 5 writes Metaspace, which does not prepend a space to a text that begins with one.
    SentencePiece, with which the model was trained, always does.

    Raises:
      ValueError: if the tokenizer.json has other steps before the encoding.
    """
    normalizer = list(pipeline_steps(content["normalizer"]))
    pre_tokenizer = list(pipeline_steps(content["pre_tokenizer"]))
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if not pre_tokenizer and normalizer in ([prepend, replace], [replace]):
        return len(normalizer) == 2
    if not normalizer and len(pre_tokenizer) == 1:
        (step,) = pre_tokenizer
        if step["type"] == "Metaspace" and not step.get("split", True):
            return bool(step.get("prepend_scheme", "always") != "never")
    raise ValueError("normalizes or splits text before encoding it")


def _ranks(merges: Sequence[tuple[str, str]], tied: frozenset[str] = frozenset()) -> dict[str, int]:
    """Returns the merge rank of each piece; runs of a character in `tied` share one rank."""
    ranks: dict[str, int] = {}
    groups: dict[str, int] = {}
    previous = ""
    repeated = set()
    for left, right in merges:
        text = left + right
        group = text[0] if tied.issuperset(text) and len(set(text)) == 1 else text
        if group in groups and group != previous:
            repeated.add(text)
        ranks[text] = groups.setdefault(group, len(groups))
        previous = group
    if not repeated:
        return ranks
    if tied or any(len(set(text)) > 1 for text in repeated):
        raise ValueError(f"merges {min(repeated)!r} at several ranks")
    return _ranks(merges, frozenset(text[0] for text in repeated))


def _splits(text: str) -> Iterator[tuple[str, str]]:
    for i in range(1, len(text)):
        yield text[:i], text[i:]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the (number, value) fields of a valid protobuf message; values are int or bytes."""
    offset = 0
    while offset < len(data):
        tag, offset = read_varint(data, offset)
        if tag & 7 == 0:
            value, offset = read_varint(data, offset)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:
            size, offset = read_varint(data, offset)
        yield tag >> 3, data[offset : offset + size]
        offset += size
