"""Parquet and ArrayRecord: file formats with an index of their own."""

from __future__ import annotations

import collections
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llama_jax.errors import DataError

from .files import File, sampled_digest
from .lines import parse_object, text_field
from .records import MAX_RECORD_BYTES, BadRecord, Blocks, Records, decode

# Row groups that are shuffled together: as many as fit in these bytes, uncompressed, and at least four. Twice
# as many are kept, because the lanes of a batch read nearby positions of the shuffled order.
_WINDOW_BYTES = 256 << 20
_LEAST_WINDOW = 4
_OPEN_FILES = 64


class Parquet(Records):
    """Parquet files, read one row group at a time: one text column, or rows.

    Attributes:
      columns: the columns to read; None for all.
    """

    def __init__(self, files: Sequence[File], field: str | None):
        """Opens the files; `field` is the text column, None reads rows."""
        self.files = files
        self.columns: list[str] | None = None if field is None else [field]
        self._field = field
        self._open: _LruCache = _LruCache(_OPEN_FILES)
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
        group_bytes = -(-nbytes // max(len(blocks), 1))
        window = max(_LEAST_WINDOW, _WINDOW_BYTES // max(group_bytes, 1))
        self.blocks = Blocks(np.array(blocks, np.int64), min(window, max(len(blocks), 1)))
        self._groups: _LruCache = _LruCache(2 * self.blocks.window)
        self._block_ends = np.cumsum(self.blocks.sizes)
        self.nbytes = nbytes
        self.digest = _digest(files)

    def text(self, index: int) -> str:
        table, row = self._group(index)
        value = table.column(0)[row]
        where = self.location(index)
        if not value.is_valid:
            raise BadRecord("field is not text", f"{where}: field {self._field!r} is null")
        data = value.as_buffer()
        if data.size > MAX_RECORD_BYTES:
            raise BadRecord("too long", f"{where}: {data.size} bytes, more than {MAX_RECORD_BYTES}")
        return decode(data.to_pybytes(), where)

    def row(self, index: int) -> dict[str, Any]:
        table, row = self._group(index)
        one, where = table.slice(row, 1), self.location(index)
        if one.nbytes > MAX_RECORD_BYTES:
            raise BadRecord("too long", f"{where}: {one.nbytes} bytes, more than {MAX_RECORD_BYTES}")
        try:
            (fields,) = one.to_pylist()
        except UnicodeDecodeError:
            raise BadRecord("not UTF-8", f"{where}: not UTF-8") from None
        return fields

    def location(self, index: int) -> str:
        file, row = self.locate(index)
        return f"{self.files[file].path}, row {row}"

    def _group(self, index: int) -> tuple[Any, int]:
        """Returns the row group of a record, and the record's index in it."""
        i, _ = self.locate(index)
        self.files[i].check()
        block = int(np.searchsorted(self._block_ends, index, side="right"))
        with self._open.lock:
            rows = self._groups.get(block, lambda: self._read_group(i, block - self._first_block[i]))
        return rows, index - int(self._block_ends[block]) + len(rows)

    def _file(self, i: int) -> Any:
        import pyarrow.parquet

        return self._open.get(i, lambda: _call(self.files[i], pyarrow.parquet.ParquetFile))

    def _column(self, i: int, field: str) -> int:
        """Returns the index of the text column.

        Raises:
          DataError: if it does not exist, or is not of type string.
        """
        import pyarrow as pa

        schema = _call(self.files[i], lambda _: self._file(i).schema_arrow)
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
        table = _call(
            self.files[i],
            lambda _: self._file(i).read_row_group(group, columns=self.columns, use_threads=False),
        )
        return table.combine_chunks()


class ArrayRecord(Records):
    """ArrayRecord files of UTF-8 text, or of JSON objects whose `field` is the text.

    They are read as JSON if the first record is an object with that field.
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
                text_field(self.readers.read(*self.locate(0)), field, "")
                self._json = True
            except BadRecord:
                pass

    def text(self, index: int) -> str:
        i, record = self.locate(index)
        where = f"{self.files[i].path}, record {record}"
        data = self.readers.read(i, record)
        if len(data) > MAX_RECORD_BYTES:
            raise BadRecord("too long", f"{where}: {len(data)} bytes, more than {MAX_RECORD_BYTES}")
        return text_field(data, self._field, where) if self._json else decode(data, where)

    def row(self, index: int) -> dict[str, Any]:
        i, record = self.locate(index)
        data, where = self.readers.read(i, record), self.location(index)
        if len(data) > MAX_RECORD_BYTES:
            raise BadRecord("too long", f"{where}: {len(data)} bytes, more than {MAX_RECORD_BYTES}")
        return parse_object(data, where)


class Readers:
    """A cache of open ArrayRecord files; every process opens its own."""

    def __init__(self, files: Sequence[File]):
        self._files = files
        self._open: _LruCache = _LruCache(_OPEN_FILES)

    def count(self, file: int) -> int:
        """Returns the number of records in a file."""
        return _call(self._files[file], lambda _: self._reader(file).num_records())

    def read(self, file: int, record: int) -> bytes:
        """Returns one record.

        Raises:
          DataError: if it cannot be read.
        """
        self._files[file].check()
        with self._open.lock:
            return _call(self._files[file], lambda _: self._reader(file).read([record])[0])

    def _reader(self, i: int) -> Any:
        from array_record.python import array_record_module

        def open_reader(path: str) -> Any:
            reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
            if not reader.ok():
                raise ValueError("not an ArrayRecord file")
            return reader

        return self._open.get(i, lambda: open_reader(self._files[i].path))


class _LruCache:
    """A least-recently-used cache; pickling drops its items.

    Attributes:
      lock: hold it while using an item: training prefetches in one thread, evaluation reads in another.
    """

    def __init__(self, max_size: int):
        self.lock = threading.RLock()
        self._max_size = max_size
        self._items: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def get(self, key: int, make: Callable[[], Any]) -> Any:
        if key not in self._items:
            value = make()
            while len(self._items) >= self._max_size:
                self._items.popitem(last=False)
            self._items[key] = value
        self._items.move_to_end(key)
        return self._items[key]

    def __reduce__(self) -> tuple[type[_LruCache], tuple[int]]:
        return _LruCache, (self._max_size,)


def _digest(files: Sequence[File]) -> str:
    return hashlib.blake2b(b"".join(map(sampled_digest, files)), digest_size=16).hexdigest()


def _call(file: File, call: Callable[[str], Any]) -> Any:
    """Calls a library on a file, and converts its exceptions to one-line DataErrors."""
    try:
        return call(file.path)
    except (OSError, ValueError, IndexError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        why = " ".join(str(error).split())[:120]
        raise DataError(f"{file.path} cannot be read ({why}); copy it again") from None
    except ImportError as error:
        raise DataError(f"{file.path} needs the package {error.name}; install it") from None
