"""SentencePiece vocabularies: `.model` files, and models built from pieces that other files carry.

Text is encoded by the sentencepiece library alone; files that hold only pieces and scores are first
turned into the protocol buffer that it loads.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import settings
from llama_jax.tokenizer.base import EACH, Roles, Table, TableTokenizer
from llama_jax.tokenizer.files import one_line, read_bytes

SPACE = "\u2581"  # stands for a space inside pieces

# Kinds of pieces, by their numbers in SentencePiece's protocol buffer, which GGUF uses too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """One entry of a vocabulary whose id is its place: spelling, merge score, kind."""

    text: str
    score: float
    kind: int


class SentencePieceTokenizer(TableTokenizer):
    """A `Tokenizer` over a loaded SentencePiece model.

    Text between two control tokens that `encode` parses is encoded like a text of its own, with its
    own prefix space: this is how Meta's code encodes the turns of a conversation.
    """

    def __init__(self, model: sentencepiece.SentencePieceProcessor, pieces: Table, roles: Roles, origin: str):
        super().__init__(pieces, roles, origin)
        self._model = model
        longest_first = sorted(map(re.escape, self.special_tokens), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return self._model.encode(text)
        ids: list[int] = []
        for i, part in enumerate(self._special.split(text)):
            ids.extend([self.special_tokens[part]] if i % 2 else self._model.encode(part))
        return ids

    def spelling(self, id: int) -> str:
        """Returns one vocabulary entry as its file spells it."""
        return self._model.id_to_piece(id)

    @property
    def proto(self) -> bytes:
        """The model as the protocol buffer that a `.model` file is."""
        return self._model.serialized_model_proto()


def load(path: Path) -> SentencePieceTokenizer:
    """Loads a SentencePiece `.model` file.

    BOS comes first unless a tokenizer_config.json beside the file says otherwise, as in Meta's code:
    the file itself has no say.

    Raises:
      TokenizerError: if it is missing, truncated or no SentencePiece model.
    """
    data = read_bytes(path)
    # A cut between two pieces leaves a valid, shorter buffer, and an empty file is a valid buffer too:
    # the library loads both. Whole models end with the trainer's and the normalizer's settings.
    if not {1, 2, 3} <= set(_fields(data)):
        raise TokenizerError(
            f"{path} is not a whole SentencePiece model ({len(data)} bytes): it is empty, truncated or of "
            "another format; take a fresh copy"
        )
    model = load_model(data, str(path))
    roles = Roles(
        bos_id=_role(model.bos_id()),
        eos_id=_role(model.eos_id()),
        unk_id=_role(model.unk_id()),
        pad_id=_role(model.pad_id()),
        add_bos=model.bos_id() >= 0,
    )
    pieces = table(model)
    return SentencePieceTokenizer(
        model, pieces, settings.beside(path).apply(roles, pieces.special), str(path)
    )


def load_model(data: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    """Returns the loaded model; raises TokenizerError if the library refuses it."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
        model.id_to_piece(list(range(model.vocab_size())))  # each must be UTF-8, which loading does not check
    except (RuntimeError, ValueError, IndexError) as error:
        raise TokenizerError(
            f"{origin} holds no usable SentencePiece vocabulary ({one_line(error)}); take a fresh copy"
        ) from None
    if not model.vocab_size():
        raise TokenizerError(f"{origin} holds a SentencePiece vocabulary of no pieces; take a fresh copy")
    return model


def build_model(
    pieces: Iterable[Piece],
    origin: str,
    *,
    add_space_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> sentencepiece.SentencePieceProcessor:
    """Builds the BPE model that `pieces` describe, with no text normalisation but spaces.

    The buffer (google/sentencepiece, src/sentencepiece_model.proto) is written by hand: it has a
    handful of fields, and the generated protobuf module clashes with other packages' copies of it in
    the same process.

    Raises:
      TokenizerError: if the library refuses the vocabulary (twice the same piece, an empty one, no
        unknown piece, some of the 256 bytes).
    """
    out = bytearray()
    has_bytes = False
    for text, score, kind in pieces:
        has_bytes |= kind == BYTE
        out += _field(
            1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes((kind,))
        )
    out += _field(2, b"\x18\x02" + (b"\x98\x02\x01" if has_bytes else b""))  # model_type BPE, byte_fallback
    spaces = bytes((0x18, add_space_prefix, 0x20, remove_extra_whitespaces))
    out += _field(3, _field(1, b"identity") + spaces)
    return load_model(bytes(out), origin)


def with_control_pieces(proto: bytes, names: Iterable[str]) -> bytes:
    """A model with control pieces added at its end; repeated fields of a protocol buffer are joined."""
    return proto + b"".join(_field(1, _field(1, name.encode()) + bytes((0x18, CONTROL))) for name in names)


def table(model: sentencepiece.SentencePieceProcessor) -> Table:
    """Returns how the ids of a loaded model become bytes."""
    pieces, special, prefixed = [], {}, []
    for token in range(model.vocab_size()):
        name = model.id_to_piece(token)
        piece = name.replace(SPACE, " ").encode()
        if model.is_byte(token):
            piece = bytes((int(name[3:5], 16),))
        elif model.is_unknown(token):
            piece = model.decode([token]).encode()
        elif model.is_control(token):
            piece = name.encode()
            special[name] = token
        elif name.startswith(SPACE):
            prefixed.append(token)
        pieces.append(piece)
    # The library has no accessors for its normalizer's settings, but its behaviour shows them.
    if not (prefixed and model.decode(prefixed[:1]) == pieces[prefixed[0]][1:].decode()):
        prefixed = []
    return Table(pieces, special, frozenset(prefixed), trims=not model.encode(" "), errors=EACH)


def _role(token: int) -> int | None:
    return token if token >= 0 else None


def _field(number: int, body: bytes) -> bytes:
    """Encodes a string or message field of a protocol buffer; `number` is below 16."""
    return bytes((number << 3 | 2,)) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    """Encodes a non-negative int the way protocol buffers do: seven bits a byte, low ones first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(data: bytes) -> Iterator[int]:
    """Yields the numbers of a buffer's outermost fields; stops where it is malformed."""
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        if tag & 7 != 2:
            return
        length, at = read_varint(data, at)
        at += length
        if at > len(data):
            return
        yield tag >> 3


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Decodes what `_varint` encodes, at byte `at`; returns it and where it ends."""
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if data[at - 1] < 0x80:
            break
    return value, at
