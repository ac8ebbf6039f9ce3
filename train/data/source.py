"""Documents as token ids: tokenized on the fly, or read from a folder of token ids."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llama_jax.errors import DataError, TokenizerError

from ..config.data import SourceConfig
from .encode import Encoder
from .files import INDEX, File, detect_format, find_files
from .lines import JsonLines, Text
from .records import BadRecord, Blocks, Records, record_keys
from .tables import ArrayRecord, Parquet, Readers

VERSION = 2  # format version of a folder of token ids
HEADER_BYTES = 4  # before a document's ids: the UTF-8 length of its text, little-endian


@dataclasses.dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
      ids: int32 [n]; empty for an empty text.
      nbytes: UTF-8 length of its text.
    """

    ids: np.ndarray
    nbytes: int


class Source(Protocol):
    """The documents of one `SourceConfig`, in order.

    Attributes:
      keys: uint64 [documents], a hash of each document's file and number.
      nbytes: approximate number of bytes of text.
      blocks: as in `Records`.
      fingerprint: a hash of the documents and their order.
    """

    keys: np.ndarray
    nbytes: int
    blocks: Blocks | None
    fingerprint: str

    def document(self, index: int) -> Document:
        """Returns one document.

        Raises:
          BadRecord: if its record cannot be used.
          DataError: if its file cannot be read.
        """


class TextSource:
    """Text records, tokenized on access."""

    def __init__(self, records: Records, field: str, encode: Encoder):
        self.records = records
        self.names = [file.name for file in records.files]
        self.keys = record_keys(self.names, records.counts)
        self.nbytes = records.nbytes
        self.blocks = records.blocks
        self._encode = encode
        serialized = json.dumps([type(records).__name__, field, self.names, records.counts.tolist()])
        self.fingerprint = hashlib.blake2b((serialized + records.digest).encode(), digest_size=16).hexdigest()

    def document(self, index: int) -> Document:
        text = self.records.text(index)
        if not text:
            return Document(np.zeros(0, np.int32), 0)
        try:
            return Document(self._encode(text), len(text.encode()))
        except (TokenizerError, UnicodeEncodeError):
            file, number = self.records.locate(index)
            where = f"{self.records.files[file].path}, record {number}"
            raise BadRecord("lone surrogate", f"{where}: the text has a lone surrogate") from None


class TokenSource:
    """A folder of token ids, written by `write.write_tokens`."""

    def __init__(self, folder: Path, encode: Encoder):
        index = _read_index(folder / INDEX)
        if index["tokenizer"] != encode.fingerprint:
            raise DataError(
                f"{folder} was written with another tokenizer; write it again with this one, or use the "
                "original tokenizer"
            )
        shards = []
        for name, count, size in index["shards"]:
            path = folder / name
            try:
                info = path.stat()
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror}); write the folder again") from None
            if info.st_size != size:
                raise DataError(
                    f"{path} has {info.st_size} bytes, and had {size} when it was written; write the folder "
                    "again"
                )
            shards.append((File(str(path), name, size, info.st_mtime_ns), count))
        self._files = [file for file, _ in shards]
        self._ends = np.cumsum([count for _, count in shards])
        self._readers = Readers(self._files)
        self._dtype = np.dtype(index["dtype"])
        self._vocab_size = encode.vocab_size
        self.names = [name for name, _ in index["files"]]
        self.keys = record_keys(self.names, np.array([count for _, count in index["files"]], np.int64))
        self.nbytes = index["nbytes"]
        self.blocks = _read_blocks(index["blocks"])
        self.fingerprint = index["fingerprint"]
        if shards and int(self._ends[-1]) != len(self.keys):
            raise DataError(f"{folder / INDEX} is inconsistent with its files; write the folder again")

    def document(self, index: int) -> Document:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[shard - 1]) if shard else 0
        data = self._readers.read(shard, index - first)
        where = f"{self._files[shard].path}, record {index - first}"
        if len(data) < HEADER_BYTES or (len(data) - HEADER_BYTES) % self._dtype.itemsize:
            raise DataError(f"{where}: not a document; write the folder again")
        ids = np.frombuffer(data, self._dtype, offset=HEADER_BYTES).astype(np.int32)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            raise DataError(f"{where}: token ids outside the vocabulary; write the folder again")
        return Document(ids, int.from_bytes(data[:HEADER_BYTES], "little"))


def open_source(config: SourceConfig, encode: Encoder) -> Source:
    """Opens one source.

    Raises:
      DataError: if there are no files, or they cannot be read.
    """
    folder = Path(config.files).expanduser()
    if config.format == "tokens" or (config.format == "auto" and (folder / INDEX).is_file()):
        return TokenSource(folder, encode)
    return TextSource(open_records(config), config.field, encode)


def open_records(config: SourceConfig, *, rows: bool = False) -> Records:
    """Opens one source's text, or with `rows` its records with all their fields.

    Raises:
      DataError: if there are no files, they cannot be read, or they are token ids.
    """
    if config.format == "tokens" or (Path(config.files).expanduser() / INDEX).is_file():
        raise DataError(f"{config.files!r} is a folder of token ids; use the text it was made from")
    files = find_files(config)
    match detect_format(files, config):
        case "jsonl":
            return JsonLines(files, config.field)
        case "parquet":
            return Parquet(files, None if rows else config.field)
        case "arrayrecord":
            return ArrayRecord(files, config.field)
        case _:
            return Text(files)


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); use a folder that `python -m llama_jax.train.data` "
            "wrote"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON; write the folder again") from None
    types = {
        **dict.fromkeys(("tokenizer", "fingerprint", "dtype"), str),
        **dict.fromkeys(("files", "shards"), list),
        "nbytes": int,
    }
    complete = isinstance(index, dict) and index.get("version") == VERSION and "blocks" in index
    if not complete or not all(isinstance(index.get(name), kind) for name, kind in types.items()):
        raise DataError(
            f"{path} was not written by this version of `python -m llama_jax.train.data`; write it again"
        )
    if (
        index["dtype"] not in ("<u2", "<u4")
        or not _valid_blocks(index["blocks"])
        or not _valid_rows(index["files"], 2)
        or not _valid_rows(index["shards"], 3)
    ):
        raise DataError(
            f"{path} was not written by this version of `python -m llama_jax.train.data`; write it again"
        )
    return index


def _valid_blocks(value: Any) -> bool:
    """Returns whether `value` is null, or the sizes of blocks and the number that is shuffled together."""
    if value is None:
        return True
    sizes, window = (value.get("sizes"), value.get("window")) if isinstance(value, dict) else (None, None)
    numbers = [*sizes, window] if isinstance(sizes, list) else [None]
    return all(type(number) is int and number >= 0 for number in numbers)


def _read_blocks(value: Any) -> Blocks | None:
    return None if value is None else Blocks(np.array(value["sizes"], np.int64), value["window"])


def _valid_rows(value: Sequence[Any], width: int) -> bool:
    """Returns whether `value` is a list of [file name, number, ...], with no file outside the folder."""
    return all(
        isinstance(row, list)
        and len(row) == width
        and isinstance(row[0], str)
        and all(type(number) is int and number >= 0 for number in row[1:])
        and (width == 2 or Path(row[0]).name == row[0])
        for row in value
    )
