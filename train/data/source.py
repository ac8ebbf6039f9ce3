"""Documents as token ids: tokenized on the fly, or prepared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llama_jax.errors import DataError, TokenizerError
from llama_jax.storage import as_path

from ..config.data import Format, SourceConfig
from .arrow import Arrow, Csv
from .compression import Plain
from .concatenated import Concatenated
from .encode import Document, Encoder
from .files import INDEX, File, detect_format, find_files
from .lines import JsonLines, Text
from .prepared import PreparedSource
from .records import BadRecord, Blocks, Records, bad_record_error
from .tables import ArrayRecord, Parquet


class Source(Protocol):
    """The documents of one `SourceConfig`, in order.

    Attributes:
      names: of the files, as in `File`.
      counts: int64 [files], number of documents per file.
      nbytes: approximate number of bytes of text.
      blocks: as in `Records`.
      fingerprint: a hash of the documents and their order.
    """

    names: list[str]
    counts: np.ndarray
    nbytes: int
    blocks: Blocks | None
    fingerprint: str

    def earlier_fingerprint(self) -> str:
        """Returns the fingerprint that earlier versions gave it, which may read all of it."""

    def __len__(self) -> int:
        """Returns the number of documents."""

    def document(self, index: int) -> Document:
        """Returns one document.

        Raises:
          BadRecord: if its record cannot be used.
          DataError: if its file cannot be read.
        """


class RecordSource:
    """What sources of documents and of examples have of their records.

    Attributes:
      records: the records.
      names, counts, nbytes, blocks, fingerprint: as in `Source`.
    """

    def __init__(self, records: Records, field: str | None, *settings: Any):
        """Describes the records; `settings` are JSON values that belong to the fingerprint too."""
        self.records = records
        self.names = [file.name for file in records.files]
        self.counts = records.counts
        self.nbytes = records.nbytes
        self.blocks = records.blocks
        inputs = [type(records).__name__, field, self.names, records.counts.tolist(), *settings]
        self._described = json.dumps(inputs)
        self.fingerprint = self._fingerprint(records.digest)

    def __len__(self) -> int:
        return len(self.records)

    def _fingerprint(self, digest: str) -> str:
        return hashlib.blake2b((self._described + digest).encode(), digest_size=16).hexdigest()

    def earlier_fingerprint(self) -> str:
        """As in `Source`."""
        return self._fingerprint(self.records.earlier_digest())


class TextSource(RecordSource):
    """Text records, tokenized on access."""

    def __init__(self, records: Records, field: str, encode: Encoder):
        super().__init__(records, field)
        self._encode = encode

    def document(self, index: int) -> Document:
        text = self.records.text(index)
        if not text:
            return Document(np.zeros(0, np.int32), 0)
        try:
            return Document(self._encode(text), len(text.encode()))
        except (TokenizerError, UnicodeEncodeError) as error:
            file, number = self.records.locate(index)
            where = f"{self.records.files[file].path}, record {number}"
            if "lone surrogate" in str(error) or isinstance(error, UnicodeEncodeError):
                raise BadRecord("lone surrogate", f"{where}: the text has a lone surrogate") from None
            raise BadRecord("token without embedding", f"{where}: {error}") from None

    def texts(self, index: int) -> list[str]:
        """Returns the text of one record; none if it cannot be used."""
        try:
            return [self.records.text(index)]
        except BadRecord:
            return []


class TrainDocuments:
    """Random access to training documents: their ids, or the reason a record is unusable."""

    def __init__(self, source: Source, index: Sequence[int] | np.ndarray, skip_bad: bool):
        self._source = source
        self._index = index
        self._skip_bad = skip_bad

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> np.ndarray | str:
        document = self.document(i)
        return document.ids if isinstance(document, Document) else document

    def document(self, i: int) -> Document | str:
        """Returns a document with the length of its text, or the reason a record is unusable."""
        try:
            return self._source.document(int(self._index[i]))
        except BadRecord as bad:
            if self._skip_bad:
                return bad.reason
            raise DataError(bad_record_error(bad.message)) from None

    def __repr__(self) -> str:
        return f"TrainDocuments({len(self)})"


def open_source(config: SourceConfig, encode: Encoder) -> Source:
    """Opens one source.

    Raises:
      DataError: if there are no files, or they cannot be read.
    """
    if _is_tokens(config) and len(config.patterns) == 1 and config.format in ("auto", "tokens"):
        return PreparedSource(_folder(config.patterns[0]), encode)
    return TextSource(open_records(config), config.field, encode)


def open_records(config: SourceConfig, *, rows: bool = False) -> Records:
    """Opens one source's text, or with `rows` its records with all their fields.

    Raises:
      DataError: if there are no files, they cannot be read, or they are token ids.
    """
    if _is_tokens(config):
        raise DataError(
            f"{config.title!r} is a folder of token ids; use the text it was made from"
            if len(config.patterns) == 1
            else f"{config.title!r} has a folder of token ids, which must stand alone: tokenize all of the "
            "list's files into one folder, or use [[data.mixture]]"
        )
    groups: list[tuple[Format, list[File]]] = []
    for files in find_files(config):
        file_format = detect_format(files, config)
        if groups and groups[-1][0] == file_format:
            groups[-1][1].extend(files)
        else:
            groups.append((file_format, files))
    parts = [_open(files, file_format, config, rows) for file_format, files in groups]
    return parts[0] if len(parts) == 1 else Concatenated(parts)


def _open(files: Sequence[File], file_format: Format, config: SourceConfig, rows: bool) -> Records:
    plain, column = Plain(file_format, config.format == "auto"), None if rows else config.field
    match file_format:
        case "jsonl":
            return JsonLines(files, plain, config.field)
        case "parquet":
            return Parquet([plain(file) for file in files], column)
        case "arrow":
            return Arrow([plain(file) for file in files], column)
        case "csv":
            return Csv([plain(file) for file in files], column)
        case "arrayrecord":
            return ArrayRecord([plain(file) for file in files], config.field)
        case _:
            return Text(files, plain)


def _folder(pattern: str) -> Path:
    return as_path(pattern).expanduser()


def _is_tokens(config: SourceConfig) -> bool:
    """Returns whether any of a source's files is a folder of token ids."""
    return config.format == "tokens" or any((_folder(name) / INDEX).is_file() for name in config.patterns)
