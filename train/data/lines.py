"""Plain text and JSON lines: files are scanned once for where documents begin, then read at random."""

from __future__ import annotations

import array
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np

from .files import File, windows
from .records import MAX_RECORD, BadRecord, Records, decode

T = TypeVar("T")
PIECE_BYTES = 1 << 16  # text files are cut into documents of at most this


class _Spans(Records):
    """Records that are spans of bytes of their files."""

    def __init__(self, files: Sequence[File]):
        self.files = files
        digest = hashlib.blake2b(digest_size=16)
        spans = []
        for file in files:
            with file.open() as opened:
                found = self._scan(opened, digest)
            digest.update(file.size.to_bytes(8, "little"))
            spans.append(np.array(found, np.int64).reshape(-1, 2))
        self.counts = np.array([len(part) for part in spans], np.int64)
        self._spans = np.concatenate(spans)
        self.nbytes = int(self._spans[:, 1].sum())
        self.digest = digest.hexdigest()

    def _scan(self, opened: BinaryIO, digest: hashlib.blake2b) -> array.array[int]:
        """Returns start and length of each document in turn, and hashes the file."""
        raise NotImplementedError

    def _span(self, index: int) -> tuple[File, int, int]:
        file, _ = self.locate(index)
        start, length = self._spans[index].tolist()
        return self.files[file], start, length

    def _where(self, file: File, end: int) -> str:
        """Returns `file:line` of the byte at `end`."""
        with file.open() as opened:
            line = 1
            for part in windows(opened, 1 << 20):
                line += part[: max(0, end)].count(b"\n")
                end -= len(part)
                if end <= 0:
                    break
        return f"{file.path}:{line}"


class Text(_Spans):
    """Plain text: each file, cut at line ends into pieces of at most 64 kB."""

    def _scan(self, opened: BinaryIO, digest: hashlib.blake2b) -> array.array[int]:
        found = array.array("q")
        start, rest = 0, b""
        while piece := rest + opened.read(PIECE_BYTES - len(rest)):
            cut = len(piece)
            if cut == PIECE_BYTES:
                cut = piece.rfind(b"\n", PIECE_BYTES // 2) + 1 or _character_boundary(piece)
            piece, rest = piece[:cut], piece[cut:]
            digest.update(piece)
            if piece.strip():
                found.extend((start, len(piece)))
            start += len(piece)
        return found

    def text(self, index: int) -> str:
        file, start, length = self._span(index)
        data = file.read(start, length)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            return decode(data, self._where(file, start + error.start))


def _character_boundary(data: bytes) -> int:
    """Returns where to cut UTF-8 so that the character at its end stays whole."""
    for back in range(1, 5):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # the first byte of a character, of length 1 to 4
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if length <= back else len(data) - back
    return len(data)  # no UTF-8: for the reader to say so


class JsonLines(_Spans):
    """One JSON object a line, whose `field` is the text. Blank lines count as none."""

    def __init__(self, files: Sequence[File], field: str):
        self._field = field
        super().__init__(files)

    def _scan(self, opened: BinaryIO, digest: hashlib.blake2b) -> array.array[int]:
        found = array.array("q")
        start = length = 0
        blank = True
        for part in iter(lambda: opened.readline(1 << 20), b""):
            digest.update(part)
            length += len(part)
            blank = blank and part.isspace()
            if part.endswith(b"\n"):
                if not blank:
                    found.extend((start, length))
                start, length, blank = start + length, 0, True
        if length and not blank:
            found.extend((start, length))
        return found

    def text(self, index: int) -> str:
        return self._read(index, lambda data: field_of(data, self._field, ""))

    def row(self, index: int) -> dict[str, Any]:
        return self._read(index, lambda data: object_of(data, ""))

    def where(self, index: int) -> str:
        file, start, _ = self._span(index)
        return self._where(file, start)

    def _read(self, index: int, parse: Callable[[bytes], T]) -> T:
        file, start, length = self._span(index)
        if length > MAX_RECORD:
            where = self._where(file, start)
            raise BadRecord("too long", f"{where}: the line has {length} bytes, more than {MAX_RECORD}")
        try:
            return parse(file.read(start, length))
        except BadRecord as bad:
            raise BadRecord(bad.reason, self._where(file, start) + bad.message) from None


def field_of(data: bytes, field: str, where: str) -> str:
    """Returns the text in one field of a JSON object.

    Raises:
      BadRecord: if there is none.
    """
    value = object_of(data, where)
    if field not in value:
        raise BadRecord("no such field", f"{where}: no field {field!r} (fields: {named(value)})")
    if not isinstance(value[field], str):
        kind = type(value[field]).__name__
        raise BadRecord("field is not text", f"{where}: field {field!r} is of type {kind}, not text")
    return value[field]


def named(fields: Iterable[str]) -> str:
    """Returns the first names of fields for a message."""
    return ", ".join(repr(name[:40]) for name in itertools.islice(fields, 8)) or "none"


def object_of(data: bytes, where: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
      BadRecord: if it is none.
    """
    try:
        value = json.loads(decode(data, where))
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", f"{where}: not JSON ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(value, dict):
        raise BadRecord("not an object", f"{where}: a JSON {type(value).__name__}, not an object")
    return value
