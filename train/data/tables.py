"""Parquet and ArrayRecord: files that index themselves."""

from __future__ import annotations

import collections
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llama_jax.errors import DataError

from .files import File, sampled_digest
from .lines import field_of, object_of
from .records import MAX_RECORD, BadRecord, Records, decode

_CACHED_GROUPS = 8  # the rows of a batch read about the same place of the shuffled order
_OPEN_FILES = 64


class Parquet(Records):
    """Parquet files, read a row group at a time: one column of text, or rows.

    Attributes:
      columns: those that are read, None for all of them.
    """

    def __init__(self, files: Sequence[File], field: str | None):
        """Opens the files; `field` names the text column, None is for rows."""
        self.files = files
        self.columns: list[str] | None = None if field is None else [field]
        self._field = field
        self._open: _Cache = _Cache(_OPEN_FILES)
        self._groups: _Cache = _Cache(_CACHED_GROUPS)
        counts: list[int] = []
        blocks: list[int] = []
        nbytes = 0
        self._first_block = []
        for i in range(len(files)):
            metadata = self._file(i).metadata
            column = None if field is None else self._column(i, field)
            groups = [metadata.row_group(j) for j in range(metadata.num_row_groups)]
            counts.append(metadata.num_rows)
            self._first_block.append(len(blocks))
            blocks.extend(group.num_rows for group in groups)
            nbytes += sum(
                group.total_byte_size if column is None else group.column(column).total_uncompressed_size
                for group in groups
            )
        self.counts = np.array(counts, np.int64)
        self.blocks = np.array(blocks, np.int64)
        self._block_ends = np.cumsum(self.blocks)
        self.nbytes = nbytes
        self.digest = _digest(files)

    def text(self, index: int) -> str:
        table, row = self._group(index)
        value = table.column(0)[row]
        where = self.where(index)
        if not value.is_valid:
            raise BadRecord("field is not text", f"{where}: field {self._field!r} is null")
        data = value.as_buffer()
        if data.size > MAX_RECORD:
            raise BadRecord("too long", f"{where}: {data.size} bytes, more than {MAX_RECORD}")
        return decode(data.to_pybytes(), where)

    def row(self, index: int) -> dict[str, Any]:
        table, row = self._group(index)
        one, where = table.slice(row, 1), self.where(index)
        if one.nbytes > MAX_RECORD:
            raise BadRecord("too long", f"{where}: {one.nbytes} bytes, more than {MAX_RECORD}")
        try:
            (fields,) = one.to_pylist()
        except UnicodeDecodeError:
            raise BadRecord("not UTF-8", f"{where}: not UTF-8") from None
        return fields

    def where(self, index: int) -> str:
        file, row = self.locate(index)
        return f"{self.files[file].path}, row {row}"

    def _group(self, index: int) -> tuple[Any, int]:
        """Returns the row group of a record, and its place in it."""
        i, _ = self.locate(index)
        self.files[i].check()
        block = int(np.searchsorted(self._block_ends, index, side="right"))
        with self._open.lock:
            rows = self._groups.get(block, lambda: self._read_group(i, block - self._first_block[i]))
        return rows, index - int(self._block_ends[block]) + len(rows)

    def _file(self, i: int) -> Any:
        import pyarrow.parquet

        return self._open.get(i, lambda: _guard(self.files[i], pyarrow.parquet.ParquetFile))

    def _column(self, i: int, field: str) -> int:
        """Returns the number of the text column, checked."""
        import pyarrow as pa

        schema = _guard(self.files[i], lambda _: self._file(i).schema_arrow)
        if field not in schema.names:
            names = ", ".join(repr(name) for name in schema.names[:8])
            raise DataError(
                f"{self.files[i].path} has no column {field!r} (columns: {names}); set data.field"
            )
        kind = schema.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"{self.files[i].path}: column {field!r} is of type {kind}, not string; set data.field"
            )
        metadata = self._file(i).metadata
        paths = [metadata.schema.column(j).path for j in range(metadata.num_columns)]
        return paths.index(field)

    def _read_group(self, i: int, group: int) -> Any:
        table = _guard(
            self.files[i],
            lambda _: self._file(i).read_row_group(group, columns=self.columns, use_threads=False),
        )
        return table.combine_chunks()


class ArrayRecord(Records):
    """ArrayRecord files of UTF-8 text, or of JSON objects whose `field` is the text.

    They are JSON if the first record is an object with that field.
    """

    def __init__(self, files: Sequence[File], field: str):
        self.files = files
        self._field = field
        self.readers = Readers(files)
        self.counts = np.array([self.readers.count(i) for i in range(len(files))], np.int64)
        self.nbytes = sum(file.size for file in files)
        self.digest = _digest(files)
        self._json = False
        if len(self):
            try:
                field_of(self.readers.read(*self.locate(0)), field, "")
                self._json = True
            except BadRecord:
                pass

    def text(self, index: int) -> str:
        i, record = self.locate(index)
        where = f"{self.files[i].path}, record {record}"
        data = self.readers.read(i, record)
        if len(data) > MAX_RECORD:
            raise BadRecord("too long", f"{where}: {len(data)} bytes, more than {MAX_RECORD}")
        return field_of(data, self._field, where) if self._json else decode(data, where)

    def row(self, index: int) -> dict[str, Any]:
        i, record = self.locate(index)
        data, where = self.readers.read(i, record), self.where(index)
        if len(data) > MAX_RECORD:
            raise BadRecord("too long", f"{where}: {len(data)} bytes, more than {MAX_RECORD}")
        return object_of(data, where)


class Readers:
    """Open ArrayRecord files; another process opens its own."""

    def __init__(self, files: Sequence[File]):
        self._files = files
        self._open: _Cache = _Cache(_OPEN_FILES)

    def count(self, file: int) -> int:
        """Returns the number of records in a file."""
        return _guard(self._files[file], lambda _: self._reader(file).num_records())

    def read(self, file: int, record: int) -> bytes:
        """Returns one record.

        Raises:
          DataError: if it cannot be read.
        """
        self._files[file].check()
        with self._open.lock:
            return _guard(self._files[file], lambda _: self._reader(file).read([record])[0])

    def _reader(self, i: int) -> Any:
        from array_record.python import array_record_module

        def open_reader(path: str) -> Any:
            reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
            if not reader.ok():
                raise ValueError("no ArrayRecord file")
            return reader

        return self._open.get(i, lambda: open_reader(self._files[i].path))


class _Cache:
    """The things last used, a bounded number of them; none of them goes to another process.

    Attributes:
      lock: to be held while one is used: training reads ahead in one thread, evaluation in another.
    """

    def __init__(self, most: int):
        self.lock = threading.RLock()
        self._most = most
        self._held: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def get(self, key: int, make: Callable[[], Any]) -> Any:
        if key not in self._held:
            value = make()
            while len(self._held) >= self._most:
                self._held.popitem(last=False)
            self._held[key] = value
        self._held.move_to_end(key)
        return self._held[key]

    def __reduce__(self) -> tuple[type[_Cache], tuple[int]]:
        return _Cache, (self._most,)


def _digest(files: Sequence[File]) -> str:
    return hashlib.blake2b(b"".join(map(sampled_digest, files)), digest_size=16).hexdigest()


def _guard(file: File, call: Callable[[str], Any]) -> Any:
    """Calls a library on a file; what it raises becomes one line."""
    try:
        return call(file.path)
    except (OSError, ValueError, IndexError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        why = " ".join(str(error).split())[:120]
        raise DataError(f"{file.path} cannot be read ({why}); take a fresh copy") from None
    except ImportError as error:
        raise DataError(f"{file.path} needs the package {error.name}; install it") from None
