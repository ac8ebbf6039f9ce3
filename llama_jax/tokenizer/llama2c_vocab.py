"""llama2.c's `tok*.bin`: a SentencePiece BPE vocabulary reduced to pieces and merge scores.

Layout, little-endian (karpathy/llama2.c, tokenizer.py): int32 length of the longest piece; then for
each id float32 score, int32 length, bytes. Pieces spell spaces as spaces; ids 0, 1, 2 are unknown,
BOS and EOS, and the two latter stand between newlines.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import Roles
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
    table,
)

_UNKNOWN_ID, _BOS_ID, _EOS_ID = 0, 1, 2
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def load(path: Path) -> SentencePieceTokenizer:
    """Loads a llama2.c vocabulary. BOS comes first, as in llama2.c.

    Raises:
      TokenizerError: if the file is missing, truncated or no such vocabulary.
    """
    model = build_model(_pieces(path, read_bytes(path)), str(path))
    roles = Roles(bos_id=_BOS_ID, eos_id=_EOS_ID, unk_id=_UNKNOWN_ID, add_bos=True)
    return SentencePieceTokenizer(model, table(model), roles, str(path))


def _pieces(path: Path, data: bytes) -> Iterator[Piece]:
    def wrong(what: str) -> TokenizerError:
        return TokenizerError(f"{path} is not a whole llama2.c vocabulary: {what}; take a fresh copy")

    if len(data) < 4:
        raise wrong(f"it has {len(data)} bytes")
    (longest,) = struct.unpack_from("<i", data)
    if not 0 < longest <= len(data):
        raise wrong(f"its longest piece would have {longest} bytes, the file has {len(data)}")
    at, token = 4, 0
    while at < len(data):
        if at + 8 > len(data):
            raise wrong(f"piece {token} at byte {at} is cut off")
        score, length = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= length <= min(longest, len(data) - at):
            raise wrong(f"piece {token} would have {length} bytes of {len(data) - at}, and {longest} at most")
        if not math.isfinite(score):
            raise wrong(f"piece {token} has the score {score}")
        try:
            text = data[at : at + length].decode()
        except UnicodeDecodeError as error:
            raise wrong(f"piece {token} is not UTF-8 ({error.reason})") from None
        at += length
        yield _piece(token, text, score)
        token += 1
    if token <= _EOS_ID:
        raise wrong(f"it has {token} pieces, and needs unknown, BOS and EOS at least")


def _piece(token: int, text: str, score: float) -> Piece:
    if token == _UNKNOWN_ID:
        return Piece(text, score, UNKNOWN)
    if token in (_BOS_ID, _EOS_ID):
        return Piece(text.strip("\n"), score, CONTROL)
    return Piece(text.replace(" ", SPACE), score, BYTE if _BYTE_PIECE.fullmatch(text) else NORMAL)
