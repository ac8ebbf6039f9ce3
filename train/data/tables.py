"""Tables of Arrow's types, from Parquet files; and ArrayRecord, another format with an index of its own."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from llama_jax.errors import DataError, LlamaJaxError
from llama_jax.storage import as_path, is_address

from .files import File, sampled_digest
from .lines import parse_object, parse_value, text_field
from .object_records import ObjectRecords
from .records import MAX_RECORD_BYTES, BadRecord, Blocks, Records, decode

# Row groups that are shuffled together: as many as fit in these bytes, uncompressed, and at least four. Twice
# as many are kept, because the lanes of a batch read nearby positions of the shuffled order.
_WINDOW_BYTES = 256 << 20
_LEAST_WINDOW = 4
_OPEN_FILES = 64
_SMALL_BATCH = 256  # rows
_READ_AT_ONCE = 16  # files whose headers and samples are read at a start
T = TypeVar("T")


class Table(Records):
    """Rows of Arrow tables: one text column, or all fields.

    Text may be of any of Arrow's types for it (string, large_string, string_view, dictionaries of them), or
    bytes in UTF-8. Columns of `datasets.Json()` hold JSON as text, and are parsed.

    Attributes:
      columns: the columns to read; None for all.
    """

    def __init__(self, files: Sequence[File], field: str | None):
        """`field` is the text column, None reads rows."""
        self.files = files
        self.columns: list[str] | None = None if field is None else [field]
        self._field = field

    @abc.abstractmethod
    def _table(self, index: int) -> tuple[Any, int]:
        """Returns a table or record batch of the selected columns, and a record's index in it."""

    def select(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)

    def text(self, index: int) -> str:
        table, row = self._table(index)
        value = table.column(0)[row]
        value = getattr(value, "value", value)  # of a dictionary
        if not value.is_valid:
            raise BadRecord("field is not text", f"{self.location(index)}: field {self._field!r} is null")
        data = value.as_buffer()
        if data.size > MAX_RECORD_BYTES:
            where = self.location(index)
            raise BadRecord("too long", f"{where}: {data.size} bytes, more than {MAX_RECORD_BYTES}")
        try:
            return data.to_pybytes().decode()
        except UnicodeDecodeError:
            return decode(data.to_pybytes(), self.location(index))

    def row(self, index: int) -> dict[str, Any]:
        table, row = self._table(index)
        one = table.slice(row, 1)
        fields, size = {}, 0
        for field, column in zip(one.schema, one.columns, strict=True):
            kind, value = str(field.type), column[0]
            size += 0 if "dictionary<" in kind else column.nbytes  # a slice counts all of a dictionary
            if size > MAX_RECORD_BYTES:
                where = self.location(index)
                raise BadRecord("too long", f"{where}: {size} bytes or more, more than {MAX_RECORD_BYTES}")
            try:
                value = value.as_py()
                if "binary" in kind or "extension<" in kind:
                    value = _plain(value, field.type, f"{self.location(index)}, column {field.name!r}")
            except UnicodeDecodeError:
                where = self.location(index)
                raise BadRecord("not UTF-8", f"{where}: not UTF-8 (column {field.name!r})") from None
            except (ValueError, OverflowError, NotImplementedError, KeyError, TypeError):
                pass  # dates that Python has no type for, and the like: no text, whatever they are
            fields[field.name] = value
        return fields

    def location(self, index: int) -> str:
        file, row = self.locate(index)
        return f"{self.files[file].path}, row {row}"

    def _check_text_column(self, file: File, schema: Any) -> None:
        """Raises DataError if the text column does not exist, or does not hold text."""
        import pyarrow as pa

        if self._field is None:
            return
        if self._field not in schema.names:
            names = ", ".join(repr(name) for name in schema.names[:8])
            raise DataError(f"{file.path} has no column {self._field!r} (columns: {names}); set data.field")
        if schema.names.count(self._field) > 1:
            raise DataError(f"{file.path} has several columns {self._field!r}; rename all but one")
        kind = stored = schema.field(self._field).type
        if pa.types.is_dictionary(kind):
            stored = kind.value_type
        if str(stored) not in _TEXT_TYPES:
            raise DataError(
                f"{file.path}: column {self._field!r} is of type {kind}, not string; set data.field"
            )


_TEXT_TYPES = {f"{size}{kind}" for kind in ("string", "binary") for size in ("", "large_")}
_TEXT_TYPES |= {"string_view", "binary_view"}


def _plain(value: Any, kind: Any, where: str) -> Any:
    """Returns a value with bytes as text, and what `datasets.Json()` stores as text parsed.

    Raises:
      BadRecord: for JSON that is none.
      UnicodeDecodeError: for bytes that are not UTF-8.
    """
    import pyarrow as pa

    if value is None or pa.types.is_primitive(kind):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name == "arrow.json":
            return parse_value(value, where)
        kind = kind.storage_type
    if isinstance(value, dict):
        return {name: _plain(part, kind.field(name).type, where) for name, part in value.items()}
    if isinstance(value, list) and not pa.types.is_map(kind):
        return [_plain(part, kind.value_type, where) for part in value]
    return value


class Parquet(Table):
    """Parquet files, read one row group at a time."""

    def __init__(self, files: Sequence[File], field: str | None):
        """Opens the files; `field` is the text column, None reads rows."""
        super().__init__(files, field)
        self._open: LruCache = LruCache(_OPEN_FILES)
        counts: list[int] = []
        blocks: list[int] = []
        nbytes = 0
        self._first_block = []
        for i, (metadata, schema) in enumerate(_at_once(_footer, files)):
            self._check_text_column(files[i], schema)
            groups = [metadata.row_group(j) for j in range(metadata.num_row_groups)]
            rows = sum(group.num_rows for group in groups)
            if rows != metadata.num_rows or any(group.num_rows < 0 for group in groups):
                raise _damaged(files[i], f"its row groups have {rows} rows, and it says {metadata.num_rows}")
            counts.append(rows)
            self._first_block.append(len(blocks))
            blocks.extend(group.num_rows for group in groups)
            # Of all columns: asked for a damaged column's size, pyarrow ends the process.
            nbytes += sum(group.total_byte_size for group in groups)
        self.counts = np.array(counts, np.int64)
        self._group_rows = blocks
        group_bytes = -(-nbytes // max(len(blocks), 1))
        window = max(_LEAST_WINDOW, _WINDOW_BYTES // max(group_bytes, 1))
        self.blocks = Blocks(np.array(blocks, np.int64), min(window, max(len(blocks), 1)))
        self._groups: LruCache = LruCache(2 * self.blocks.window)
        self._block_ends = np.cumsum(self.blocks.sizes)
        self.nbytes = nbytes
        self.digest = samples_digest(files)

    def _table(self, index: int) -> tuple[Any, int]:
        i, _ = self.locate(index)
        self.files[i].check()
        block = int(np.searchsorted(self._block_ends, index, side="right"))
        with self._open.lock:
            rows = self._groups.get(block, lambda: self._read_group(i, block - self._first_block[i]))
        return rows, index - int(self._block_ends[block]) + len(rows)

    def _file(self, i: int) -> Any:
        return self._open.get(i, lambda: call(self.files[i], _open_parquet))

    def _read_group(self, i: int, group: int) -> Any:
        import pyarrow as pa

        def read(_: str) -> Any:
            file = self._file(i)
            try:
                table = file.read_row_group(group, columns=self.columns, use_threads=False)
                return table.combine_chunks()
            except pa.ArrowNotImplementedError:
                # A nested column with more than 2 GB of text in the row group, which does not fit into one
                # chunk: https://github.com/apache/arrow/issues/21526.
                batches = file.iter_batches(
                    _SMALL_BATCH, row_groups=[group], columns=self.columns, use_threads=False
                )
                return pa.Table.from_batches(batches)

        table = call(self.files[i], read)
        rows = self._group_rows[self._first_block[i] + group]
        if len(table) != rows:
            raise _damaged(self.files[i], f"row group {group} has {len(table)} rows, and it says {rows}")
        return table


def _open_parquet(path: str) -> Any:
    """Opens a Parquet file: one on a disk by its name, which Arrow reads in its own threads."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(as_path(path).open("rb") if is_address(path) else path)


def _footer(file: File) -> tuple[Any, Any]:
    """Returns a Parquet file's metadata and its Arrow schema."""
    with call(file, _open_parquet) as opened:
        return opened.metadata, call(file, lambda _: opened.schema_arrow)


def _damaged(file: File, problem: str) -> DataError:
    return DataError(f"{file.path} is damaged: {problem}; take a fresh copy")


class ArrayRecord(Records):
    """ArrayRecord files of UTF-8 text, or of JSON objects whose `field` is the text.

    They are read as JSON if the first record is an object with that field.
    """

    def __init__(self, files: Sequence[File], field: str):
        self.files = files
        self._field = field
        self.readers = Readers(files)
        self.counts = np.array([self.readers.count(i) for i in range(len(files))], np.int64)
        self.nbytes = sum(file.nbytes for file in files)
        self.digest = samples_digest(files)
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
        self._open: LruCache = LruCache(_OPEN_FILES)

    def count(self, file: int) -> int:
        """Returns the number of records in a file."""
        return call(self._files[file], lambda _: self._reader(file).num_records())

    def read(self, file: int, record: int) -> bytes:
        """Returns one record.

        Raises:
          DataError: if it cannot be read.
        """
        self._files[file].check()
        if is_address(self._files[file].content):
            with self._open.lock:
                reader = call(self._files[file], lambda _: self._reader(file))
            return call(self._files[file], lambda _: reader.read([record])[0])  # several at a time
        with self._open.lock:
            return call(self._files[file], lambda _: self._reader(file).read([record])[0])

    def _reader(self, i: int) -> Any:
        from array_record.python import array_record_module

        def open_reader(path: str) -> Any:
            reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")
            if not reader.ok():
                raise ValueError("not an ArrayRecord file")
            return reader

        if is_address(self._files[i].content):
            return self._open.get(i, lambda: ObjectRecords(self._files[i]))
        return self._open.get(i, lambda: open_reader(self._files[i].content))


class LruCache:
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

    def __reduce__(self) -> tuple[type[LruCache], tuple[int]]:
        return LruCache, (self._max_size,)


def samples_digest(files: Sequence[File]) -> str:
    """Hashes files by size and samples."""
    return hashlib.blake2b(b"".join(_at_once(sampled_digest, files)), digest_size=16).hexdigest()


def _at_once(read: Callable[[File], T], files: Sequence[File]) -> list[T]:
    """Returns what is read of each file, of several at a time."""
    with concurrent.futures.ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        return list(pool.map(read, files))


def call(file: File, function: Callable[[str], Any]) -> Any:
    """Calls a library on a file, and converts its exceptions to one-line DataErrors."""
    try:
        return function(file.content)
    except (
        *(OSError, ValueError, IndexError, KeyError, TypeError),
        *(RuntimeError, NotImplementedError, MemoryError),
    ) as error:
        if isinstance(error, LlamaJaxError):
            raise
        why = " ".join(str(error).split())[:120]
        raise DataError(f"{file.path} cannot be read ({why}); copy it again") from None
    except ImportError as error:
        raise DataError(f"{file.path} needs the package {error.name}; install it") from None
