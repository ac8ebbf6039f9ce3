"""Plain text, JSON Lines and JSON arrays: one scan indexes the documents; afterwards access is random."""

from __future__ import annotations

import array
import codecs
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np

from llama_jax.errors import DataError

from .files import File, read_chunks
from .records import MAX_RECORD_BYTES, BadRecord, Records, decode

T = TypeVar("T")
_BEGINNING = 1 << 12  # bytes in which an array shows its bracket
_MAX_ARRAY_BYTES = 1 << 30
DOCUMENT_BYTES = 1 << 16  # text files are split into documents of at most this size


class _Spans(Records):
    """Records that are byte ranges of their files."""

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
        """Returns start and length of each document, flattened, and updates the digest with the file."""
        raise NotImplementedError

    def _span(self, index: int) -> tuple[File, int, int]:
        file, _ = self.locate(index)
        start, length = self._spans[index].tolist()
        return self.files[file], start, length

    def _line_location(self, file: File, end: int) -> str:
        """Returns `file:line` of byte number `end`."""
        with file.open() as opened:
            line = 1
            for part in read_chunks(opened, 1 << 20):
                line += part[: max(0, end)].count(b"\n")
                end -= len(part)
                if end <= 0:
                    break
        return f"{file.path}:{line}"


class Text(_Spans):
    """Plain text: each file is split at line ends into documents of at most 64 kB."""

    def _scan(self, opened: BinaryIO, digest: hashlib.blake2b) -> array.array[int]:
        found = array.array("q")
        start, rest = 0, opened.read(len(codecs.BOM_UTF8))
        if rest == codecs.BOM_UTF8:
            digest.update(rest)
            start, rest = len(rest), b""
        while piece := rest + opened.read(DOCUMENT_BYTES - len(rest)):
            cut = len(piece)
            if cut == DOCUMENT_BYTES:
                cut = piece.rfind(b"\n", DOCUMENT_BYTES // 2) + 1 or _character_boundary(piece)
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
            return decode(data, self._line_location(file, start + error.start))


def _character_boundary(data: bytes) -> int:
    """Returns the largest split point of UTF-8 data that does not split a character."""
    for back in range(1, 5):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # first byte of a character of 1 to 4 bytes
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) if length <= back else len(data) - back
    return len(data)  # not UTF-8: reading the document reports it


class JsonLines(_Spans):
    """JSON Lines, or an array of objects, with the text in `field`. Blank lines are ignored."""

    def __init__(self, files: Sequence[File], field: str):
        self._field = field
        super().__init__(files)

    def _scan(self, opened: BinaryIO, digest: hashlib.blake2b) -> array.array[int]:
        beginning = opened.read(_BEGINNING)
        start = len(codecs.BOM_UTF8) if beginning.startswith(codecs.BOM_UTF8) else 0
        opened.seek(start)
        digest.update(beginning[:start])
        if beginning[start:].lstrip().startswith(b"["):
            return _array_elements(opened, start, digest)
        found = array.array("q")
        length = 0
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
        return self._read(index, lambda data: text_field(data, self._field, ""))

    def row(self, index: int) -> dict[str, Any]:
        return self._read(index, lambda data: parse_object(data, ""))

    def location(self, index: int) -> str:
        file, start, _ = self._span(index)
        return self._line_location(file, start)

    def _read(self, index: int, parse: Callable[[bytes], T]) -> T:
        file, start, length = self._span(index)
        if length > MAX_RECORD_BYTES:
            where = self._line_location(file, start)
            raise BadRecord("too long", f"{where}: the line has {length} bytes, more than {MAX_RECORD_BYTES}")
        try:
            return parse(file.read(start, length))
        except BadRecord as bad:
            raise BadRecord(bad.reason, self._line_location(file, start) + bad.message) from None


def _array_elements(opened: BinaryIO, start: int, digest: hashlib.blake2b) -> array.array[int]:
    """Returns start and length of each element of a JSON array, flattened.

    Raises:
      DataError: if the file is larger than can be held in memory, or not an array.
    """
    data = opened.read(_MAX_ARRAY_BYTES + 1)
    if len(data) > _MAX_ARRAY_BYTES:
        raise DataError(
            f"{opened.name}: a JSON array of over {_MAX_ARRAY_BYTES} bytes; write an object a line (.jsonl)"
        )
    digest.update(data)
    found, decoder = array.array("q"), json.JSONDecoder()
    try:
        text = data.decode()
        position = text.index("[") + 1
        read = start + position  # bytes; what precedes is ASCII
        closed = text.startswith("]", begin := _skip_space(text, position))
        while not closed:
            _, end = decoder.raw_decode(text, begin)
            read += len(text[position:begin].encode())
            length = len(text[begin:end].encode())
            found.extend((read, length))
            read, position = read + length, end
            after = _skip_space(text, end)
            if text[after : after + 1] not in (",", "]"):
                raise ValueError("an element is not followed by ',' or ']'")
            closed, begin = text[after] == "]", _skip_space(text, after + 1)
        if text[begin:].strip("] \t\r\n"):
            raise ValueError("text follows the array")
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:80]
        raise DataError(f"{opened.name}: not a JSON array ({why}); write it again") from None
    return found


def _skip_space(text: str, position: int) -> int:
    """Returns the position of the next character that is not white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


def text_field(data: bytes, field: str, where: str) -> str:
    """Returns one text field of a JSON object.

    Raises:
      BadRecord: if the data is not an object with that text field.
    """
    value = parse_object(data, where)
    if field not in value:
        raise BadRecord("no such field", f"{where}: no field {field!r} (fields: {list_names(value)})")
    if not isinstance(value[field], str):
        kind = type(value[field]).__name__
        raise BadRecord("field is not text", f"{where}: field {field!r} is of type {kind}, not text")
    return value[field]


def list_names(fields: Iterable[str]) -> str:
    """Lists the first field names for a message."""
    return ", ".join(repr(name[:40]) for name in itertools.islice(fields, 8)) or "none"


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
      BadRecord: if the data is not a JSON object.
    """
    try:
        value = json.loads(decode(data, where))
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", f"{where}: not JSON ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(value, dict):
        raise BadRecord("not an object", f"{where}: a JSON {type(value).__name__}, not an object")
    return value
