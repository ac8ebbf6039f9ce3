"""SentencePiece vocabularies: `.model` files, and models built from the pieces of other file formats.

The sentencepiece library does the encoding. Pieces and scores from other formats are first serialized as
the protocol buffer that it loads.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import REPLACE_EACH, BaseTokenizer, DecodeTable, TokenizerSettings
from llama_jax.tokenizer.files import MAX_IDS, one_line, read_bytes
from llama_jax.tokenizer.hf_config import read_hf_config

SPACE = "\u2581"  # represents a space in pieces

# Piece types, with their values in SentencePiece's protocol buffer and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """One entry of a vocabulary: its text, merge score and type."""

    text: str
    score: float
    kind: int


class SentencePieceTokenizer(BaseTokenizer):
    """A `Tokenizer` with a SentencePiece model as its encoder.

    With `parse_special`, each span between control tokens is encoded as a separate text with its own prefix
    space, as Meta's code encodes the turns of a conversation.
    """

    def __init__(
        self,
        model: sentencepiece.SentencePieceProcessor,
        pieces: DecodeTable,
        settings: TokenizerSettings,
        origin: str,
    ):
        super().__init__(pieces, settings, origin)
        self._model = model
        self._appended: frozenset[int] = frozenset()  # ids that files next to the model add
        longest_first = sorted(map(re.escape, self.special_tokens), key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(longest_first) or '(?!)'})")

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of the control tokens, and of the tokens that files next to the model add."""
        return super().added_ids | self._appended

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        if not parse_special:
            return self._model.encode(text)
        ids: list[int] = []
        for i, part in enumerate(self._special.split(text)):
            ids.extend([self.special_tokens[part]] if i % 2 else self._model.encode(part))
        return ids

    def id_to_token(self, id: int) -> str:
        """Returns one vocabulary entry as it is written in the file; empty for an id that has none."""
        return self._model.id_to_piece(id) if id < self._model.vocab_size() else ""

    @property
    def proto(self) -> bytes:
        """The model as a serialized protocol buffer, the content of a `.model` file."""
        return self._model.serialized_model_proto()


def load(path: Path) -> SentencePieceTokenizer:
    """Loads a SentencePiece `.model` file.

    `encode` prepends BOS, as in Meta's code, unless a tokenizer_config.json next to the file disables it: the
    file itself has no such setting.

    Raises:
      TokenizerError: if the file is missing, truncated or not a SentencePiece model.
    """
    data = read_bytes(path)
    # The library also loads an empty file, or one truncated between two pieces, both valid protocol buffers.
    # Complete models end with the trainer and normalizer settings.
    if not {1, 2, 3} <= set(_field_numbers(data)):
        raise TokenizerError(
            f"{path} is not a complete SentencePiece model ({len(data)} bytes): it is empty, truncated or of "
            "another format; take a fresh copy"
        )
    hf_config = read_hf_config(path)
    model = load_model(data, str(path))
    own_size = model.vocab_size()
    if added := _added_pieces(path, hf_config.added, own_size):
        model = load_model(with_pieces(data, added), str(path))
    settings = TokenizerSettings(
        bos_id=_optional_id(model.bos_id()),
        eos_id=_optional_id(model.eos_id()),
        unk_id=_optional_id(model.unk_id()),
        pad_id=_optional_id(model.pad_id()),
        add_bos=model.bos_id() >= 0,
    )
    pieces = decode_table(model)
    tokenizer = SentencePieceTokenizer(
        model, pieces, hf_config.apply(settings, pieces.special, len(pieces.pieces)), str(path)
    )
    tokenizer._appended = frozenset(range(own_size, len(pieces.pieces)))
    return tokenizer


def _added_pieces(path: Path, added: Mapping[int, tuple[str, bool]], size: int) -> list[Piece]:
    """Returns the tokens that the files next to a model add after its own `size` pieces."""
    last = max(added, default=-1)
    if last >= MAX_IDS:
        raise TokenizerError(f"{path.parent}: an added token has id {last}; ids must be below {MAX_IDS}")
    pieces = []
    for token in range(size, last + 1):
        name, special = added.get(token, (f"[PAD{token}]", None))
        kind = UNUSED if special is None else CONTROL if special else USER_DEFINED
        pieces.append(Piece(name, 0.0, kind))
    return pieces


def load_model(data: bytes, origin: str) -> sentencepiece.SentencePieceProcessor:
    """Loads a serialized model; raises TokenizerError if the library rejects it."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
        model.id_to_piece(list(range(model.vocab_size())))  # raises if a piece is not UTF-8
    except (RuntimeError, ValueError, IndexError) as error:
        raise TokenizerError(
            f"{origin} has no valid SentencePiece vocabulary ({one_line(error)}); take a fresh copy"
        ) from None
    if not model.vocab_size():
        raise TokenizerError(f"{origin} has an empty SentencePiece vocabulary; take a fresh copy")
    return model


def build_model(
    pieces: Iterable[Piece],
    origin: str,
    *,
    add_space_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> sentencepiece.SentencePieceProcessor:
    """Builds a BPE model from pieces, with no normalization except of spaces.

    The protocol buffer (google/sentencepiece, src/sentencepiece_model.proto) is serialized by hand: it has
    few fields, and the generated protobuf module conflicts with copies of it in other packages.

    Raises:
      TokenizerError: if the library rejects the vocabulary (a duplicate or empty piece, no unknown piece,
        only some of the 256 bytes).
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


def with_pieces(proto: bytes, pieces: Iterable[Piece]) -> bytes:
    """Appends pieces without a score to a serialized model; a parser concatenates repeated fields."""
    return proto + b"".join(
        _field(1, _field(1, piece.text.encode()) + bytes((0x18, piece.kind))) for piece in pieces
    )


def decode_table(model: sentencepiece.SentencePieceProcessor) -> DecodeTable:
    """Returns the mapping from ids to bytes of a loaded model."""
    pieces, special, space_prefixed = [], {}, []
    for token in range(model.vocab_size()):
        name = model.id_to_piece(token)
        piece = name.replace(SPACE, " ").encode()
        if model.is_byte(token):
            piece = bytes((int(name[3:5], 16),))
        elif model.is_unknown(token):
            piece = model.decode([token]).encode()
        elif model.is_unused(token):
            piece = b""
        elif model.is_control(token):
            piece = name.encode()
            special[name] = token
        elif name.startswith(SPACE):
            space_prefixed.append(token)
        pieces.append(piece)
    # The library has no accessors for the normalizer settings, so they are inferred from its results.
    first = space_prefixed[:1]
    if not (first and model.decode(first) == pieces[first[0]][1:].decode()):
        space_prefixed = []
    strip_all = not model.encode(" ")
    return DecodeTable(pieces, special, frozenset(space_prefixed), strip_all, REPLACE_EACH)


def _optional_id(token: int) -> int | None:
    return token if token >= 0 else None  # the library returns -1 for undefined


def _field(number: int, body: bytes) -> bytes:
    """Encodes a string or message field of a protocol buffer; `number` is below 16."""
    return bytes((number << 3 | 2,)) + _varint(len(body)) + body


def _varint(value: int) -> bytes:
    """Encodes a non-negative int as a protobuf varint: seven bits per byte, least significant first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field_numbers(data: bytes) -> Iterator[int]:
    """Yields the numbers of a message's top-level fields; stops at malformed data."""
    offset = 0
    while offset < len(data):
        tag, offset = read_varint(data, offset)
        if tag & 7 != 2:
            return
        length, offset = read_varint(data, offset)
        offset += length
        if offset > len(data):
            return
        yield tag >> 3


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """Decodes a protobuf varint; returns its value and the offset after it."""
    value = shift = 0
    while offset < len(data) and shift < 64:
        value |= (data[offset] & 0x7F) << shift
        shift += 7
        offset += 1
        if data[offset - 1] < 0x80:
            break
    return value, offset
