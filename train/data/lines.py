"""Plain text, JSON Lines and JSON arrays: documents by random access, through an index of the files."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from llama_jax.errors import DataError

from .cache import find_copy
from .compression import Plain
from .files import File, read_chunks, whole_digest
from .indexing import open_index
from .pieces import Kind
from .records import MAX_RECORD_BYTES, BadRecord, Records, decode

T = TypeVar("T")


class _Spans(Records):
    """Records that are byte ranges of their files."""

    kind: Kind

    def __init__(self, files: Sequence[File], plain: Plain):
        """Opens the files' index, which is made if there is none; `plain` decompresses them for that."""
        self._index = open_index(files, self.kind, plain)
        self.files = [
            self._as_indexed(file, plain, row) for file, row in zip(files, self._index.files, strict=True)
        ]
        self.counts = self._index.counts
        self.nbytes = self._index.nbytes
        self.digest = hashlib.blake2b(self._index.files["digest"].tobytes(), digest_size=16).hexdigest()

    def _as_indexed(self, file: File, plain: Plain, row: np.void) -> File:
        """Returns the file with the copy that was indexed, if there was one."""
        if any(key := row["copy"].tobytes()):
            copy = find_copy(key.hex())
            file = plain(file) if copy is None else dataclasses.replace(file, copy=copy)
        if file.nbytes != row["read"]:
            raise DataError(
                f"{file.content}, which {file.path} was converted to, has changed; remove it, and start again"
            )
        return file

    def earlier_digest(self) -> str:
        return whole_digest(self.files)

    def _span(self, index: int) -> tuple[File, int, int]:
        file, _ = self.locate(index)
        return self.files[file], *self._index.span(file, index)

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

    kind = "text"

    def text(self, index: int) -> str:
        file, start, length = self._span(index)
        data = file.read(start, length)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            return decode(data, self._line_location(file, start + error.start))


class JsonLines(_Spans):
    """JSON Lines, or an array of objects, with the text in `field`. Blank lines are ignored."""

    kind = "jsonl"

    def __init__(self, files: Sequence[File], plain: Plain, field: str):
        """See `_Spans`; `field` has the text."""
        self._field = field
        super().__init__(files, plain)

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
    # A byte order mark begins each file, also of several joined into one.
    value = parse_value(decode(data, where).removeprefix("\ufeff"), where)
    if not isinstance(value, dict):
        raise BadRecord("not an object", f"{where}: a JSON {type(value).__name__}, not an object")
    return value


def parse_value(text: str, where: str) -> Any:
    """Parses JSON.

    Raises:
      BadRecord: if the text is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecord("not JSON", f"{where}: not JSON ({' '.join(str(error).split())[:80]})") from None
