"""llama2.c's `tok*.bin`: a SentencePiece BPE vocabulary reduced to pieces and merge scores.

Layout, little-endian (karpathy/llama2.c, tokenizer.py): int32 length of the longest piece; then for each id
float32 score, int32 length, bytes. Spaces are not escaped; ids 0, 1, 2 are unknown, BOS and EOS, the latter
two enclosed in newlines.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import TokenizerSettings
from llama_jax.tokenizer.files import read_bytes
from llama_jax.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    Piece,
    SentencePieceTokenizer,
    build_model,
    decode_table,
)

_UNKNOWN_ID, _BOS_ID, _EOS_ID = 0, 1, 2
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def load(path: Path) -> SentencePieceTokenizer:
    """Loads a llama2.c vocabulary; `encode` prepends BOS, as in llama2.c.

    Raises:
      TokenizerError: if the file is missing, truncated or not a llama2.c vocabulary.
    """
    model = build_model(_pieces(path, read_bytes(path)), str(path))
    settings = TokenizerSettings(bos_id=_BOS_ID, eos_id=_EOS_ID, unk_id=_UNKNOWN_ID, add_bos=True)
    return SentencePieceTokenizer(model, decode_table(model), settings, str(path))


def _pieces(path: Path, data: bytes) -> Iterator[Piece]:
    def malformed(problem: str) -> TokenizerError:
        return TokenizerError(f"{path} is not a complete llama2.c vocabulary: {problem}; take a fresh copy")

    if len(data) < 4:
        raise malformed(f"it has {len(data)} bytes")
    (longest,) = struct.unpack_from("<i", data)
    if not 0 < longest <= len(data):
        raise malformed(f"the length of its longest piece is {longest}, but the file has {len(data)} bytes")
    offset, token = 4, 0
    while offset < len(data):
        if offset + 8 > len(data):
            raise malformed(f"piece {token} at byte {offset} is truncated")
        score, length = struct.unpack_from("<fi", data, offset)
        offset += 8
        if not 0 <= length <= min(longest, len(data) - offset):
            raise malformed(
                f"the length of piece {token} is {length}, with {len(data) - offset} bytes left and a "
                f"maximum of {longest}"
            )
        if not math.isfinite(score):
            raise malformed(f"piece {token} has the score {score}")
        try:
            text = data[offset : offset + length].decode()
        except UnicodeDecodeError as error:
            raise malformed(f"piece {token} is not UTF-8 ({error.reason})") from None
        offset += length
        yield _piece(token, text, score)
        token += 1
    if token <= _EOS_ID:
        raise malformed(f"it has {token} pieces; unknown, BOS and EOS are required")


def _piece(token: int, text: str, score: float) -> Piece:
    if token == _UNKNOWN_ID:
        return Piece(text, score, UNKNOWN)
    if token in (_BOS_ID, _EOS_ID):
        return Piece(text.strip("\n"), score, CONTROL)
    return Piece(text.replace(" ", SPACE), score, BYTE if _BYTE_PIECE.fullmatch(text) else NORMAL)
