"""Where the records of text and JSON files begin and end: the scan of their bytes, in bounded memory.

A scan cuts a file, or a range of one, into consecutive pieces: records, and what lies between them (blank
lines, a byte order mark, the commas of an array). Pieces are as long as the range, so their lengths alone say
where each begins. Bytes are read and hashed once, in blocks.
"""

from __future__ import annotations

import codecs
import collections
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import BinaryIO, Literal

import numpy as np

from llama_jax.errors import DataError

from .files import File

Kind = Literal["text", "jsonl"]
Pieces = tuple[np.ndarray, np.ndarray]  # int64 [n] lengths, bool [n] whether each is no record
OnBlock = Callable[[int, bytes], None]  # the number of bytes read, and the digest of their block

BLOCK_BYTES = 8 << 20
DIGEST_BYTES = 16  # of a block
DOCUMENT_BYTES = 1 << 16  # text files are split into documents of at most this size
_BEGINNING = 1 << 12  # bytes in which an array shows its bracket
_MAX_ARRAY_BYTES = 1 << 30
_HASHING = 4  # blocks in memory that are being hashed
_IS_SPACE = np.zeros(256, bool)
_IS_SPACE[list(b" \t\n\r\x0b\x0c")] = True  # as bytes.isspace


def can_split(file: File, kind: Kind) -> bool:
    """Returns whether ranges of a file can be scanned apart: of JSON Lines, which lines divide."""
    if kind == "text":
        return False  # where a document ends depends on where it begins
    with file.open() as opened:
        return not _is_array(opened.read(_BEGINNING))


def scan(
    file: File, kind: Kind, start: int, end: int, on_block: OnBlock, hashing: Executor | None = None
) -> Iterator[Pieces]:
    """Yields the pieces of bytes `start` to `end` of a file.

    The first and the last piece of a range may be parts of one line; the last one is then not followed by a
    line end.

    Args:
      file: the file.
      kind: how it is divided into records.
      start, end: multiples of BLOCK_BYTES, or the end of the file; all of it unless `can_split`.
      on_block: called after each block, in order, with its size and its digest.
      hashing: hashes blocks while the next ones are scanned.

    Raises:
      DataError: if the file cannot be read, or is a JSON array that is damaged or too large.
    """
    with file.open() as opened:
        beginning = opened.read(_BEGINNING) if start == 0 else b""
        opened.seek(start)
        if kind == "jsonl" and _is_array(beginning):
            yield _array_pieces(file, opened, on_block)
            return
        blocks = _blocks(opened, end - start, on_block, hashing)
        bom = len(codecs.BOM_UTF8) if beginning.startswith(codecs.BOM_UTF8) else 0
        if bom:
            yield np.array([bom]), np.array([True])
        yield from (_lines if kind == "jsonl" else _documents)(blocks, bom)


def block_digest(data: bytes) -> bytes:
    """Hashes a block."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def _is_array(beginning: bytes) -> bool:
    return beginning.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")


def _blocks(opened: BinaryIO, size: int, on_block: OnBlock, hashing: Executor | None) -> Iterator[bytes]:
    """Yields `size` bytes, or those up to the end of the file, in blocks."""
    pending: collections.deque[tuple[int, Future[bytes]]] = collections.deque()

    def finish(limit: int) -> None:
        while len(pending) > limit:
            length, digest = pending.popleft()
            on_block(length, digest.result())

    while size > 0 and (block := opened.read(min(BLOCK_BYTES, size))):
        size -= len(block)
        if hashing is None:
            on_block(len(block), block_digest(block))
        else:
            pending.append((len(block), hashing.submit(block_digest, block)))
            finish(_HASHING)
        yield block
    finish(0)


def _lines(blocks: Iterator[bytes], skip: int) -> Iterator[Pieces]:
    """Yields the lines, `skip` bytes left out; those of white space are no records."""
    length, blank = 0, True  # of the line that is not yet complete
    for block in blocks:
        data = np.frombuffer(block, np.uint8)[skip:]
        text, skip = memoryview(block)[skip:], 0
        ends = np.flatnonzero(data == 10) + 1
        if not len(ends):
            length, blank = length + len(data), blank and bytes(text).isspace()
            continue
        starts = np.concatenate([[0], ends[:-1]])
        lengths = ends - starts
        blanks = np.zeros(len(ends), bool)
        for i in np.flatnonzero(_IS_SPACE[data[starts]]).tolist():
            blanks[i] = bytes(text[starts[i] : ends[i]]).isspace()
        lengths[0] += length
        blanks[0] &= blank
        yield lengths, blanks
        rest = bytes(text[ends[-1] :])
        length, blank = len(rest), not rest or rest.isspace()
    if length:
        yield np.array([length]), np.array([blank])


def _documents(blocks: Iterator[bytes], skip: int) -> Iterator[Pieces]:
    """Yields the documents of a text, cut at line ends; those of white space are no records."""
    data = b""
    for block in blocks:
        data, skip = data + block[skip:], 0
        lengths, start = [], 0
        while len(data) - start >= DOCUMENT_BYTES:
            end = data.rfind(b"\n", start + DOCUMENT_BYTES // 2, start + DOCUMENT_BYTES) + 1
            end = end or start + _character_boundary(data[start : start + DOCUMENT_BYTES])
            lengths.append(end - start)
            start = end
        if lengths:
            yield _with_blanks(data, lengths)
            data = data[start:]
    if data:
        yield _with_blanks(data, [len(data)])


def _with_blanks(data: bytes, lengths: list[int]) -> Pieces:
    ends = np.cumsum(lengths)
    starts = ends - lengths
    blanks = _IS_SPACE[np.frombuffer(data, np.uint8)[starts]]
    for i in np.flatnonzero(blanks).tolist():
        blanks[i] = data[starts[i] : ends[i]].isspace()
    return np.array(lengths), blanks


def _character_boundary(data: bytes) -> int:
    """Returns the largest split point of UTF-8 data that does not split a character."""
    for back in range(1, 5):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # first byte of a character of 1 to 4 bytes
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if length <= back else len(data) - back
    return len(data)  # not UTF-8: reading the document reports it


def _array_pieces(file: File, opened: BinaryIO, on_block: OnBlock) -> Pieces:
    """Returns the elements of a JSON array, and what is between them.

    Raises:
      DataError: if the file is larger than can be held in memory, or not an array.
    """
    data = opened.read(_MAX_ARRAY_BYTES + 1)
    if len(data) > _MAX_ARRAY_BYTES:
        raise DataError(
            f"{file.path}: a JSON array of over {_MAX_ARRAY_BYTES} bytes; write an object a line (.jsonl)"
        )
    for start in range(0, len(data), BLOCK_BYTES):
        block = data[start : start + BLOCK_BYTES]
        on_block(len(block), block_digest(block))
    lengths, decoder = [], json.JSONDecoder()
    bom = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    read = 0
    try:
        text = data[bom:].decode()
        position = text.index("[") + 1
        between = bom + position  # bytes; what precedes is ASCII
        closed = text.startswith("]", begin := _skip_space(text, position))
        while not closed:
            _, end = decoder.raw_decode(text, begin)
            between += len(text[position:begin].encode())
            length = len(text[begin:end].encode())
            lengths += [between, length]
            read += between + length
            between, position = 0, end
            after = _skip_space(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise ValueError("an element is not followed by ',' or ']'")
            closed, begin = text[after] == "]", _skip_space(text, after + 1)
        if text[begin:].strip("] \t\r\n"):
            raise ValueError("text follows the array")
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:80]
        raise DataError(f"{file.path}: not a JSON array ({why}); write it again") from None
    lengths.append(len(data) - read)
    return np.array(lengths), np.arange(len(lengths)) % 2 == 0


def _skip_space(text: str, position: int) -> int:
    """Returns the position of the next character that is not white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position
