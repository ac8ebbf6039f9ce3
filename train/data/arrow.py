"""Arrow files, which `datasets` writes, read through memory maps; and CSV, converted to them."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.errors import DataError

from .cache import Sink, converted, on_disk
from .files import File, whole_digest
from .records import MAX_RECORD_BYTES
from .tables import LruCache, Table, call, samples_digest

_MAPS = 512  # open memory maps
_CSV_BATCH_BYTES = 1 << 20
_NUMBERS = ("label", "margin")  # the fields of records that are no text


class Arrow(Table):
    """Arrow files, in the stream format (as `Dataset.save_to_disk` writes) or the file format (Feather).

    Random access is cheap: a record's pages are read, and no more. Record batches that are compressed, which
    Feather's are by default, cannot be mapped: an uncompressed copy in the cache is.
    """

    def __init__(self, files: Sequence[File], field: str | None):
        """Opens the files; `field` is the text column, None reads rows."""
        super().__init__(files, field)
        self.digest = samples_digest(files)
        self._maps: LruCache = LruCache(_MAPS)
        self._checked: set[tuple[int, int]] = set()
        self.files = [self._mappable(file) for file in files]
        self._batch_ends = [np.cumsum([len(batch) for batch in self._batches(i)]) for i in range(len(files))]
        self.counts = np.array([int(ends[-1]) if len(ends) else 0 for ends in self._batch_ends], np.int64)
        self.nbytes = sum(file.nbytes for file in self.files)

    def _table(self, index: int) -> tuple[Any, int]:
        i, row = self.locate(index)
        self.files[i].check()
        number = int(np.searchsorted(self._batch_ends[i], row, side="right"))
        batch = self._batches(i)[number]
        if (i, number) not in self._checked:  # offsets beyond the data would be read, like any others
            call(self.files[i], lambda _: batch.validate(full=True))
            self._checked.add((i, number))
        if self.columns is not None:
            batch = batch.select([name for name in self.columns if name in batch.schema.names])
        return batch, row - int(self._batch_ends[i][number]) + len(batch)

    def _batches(self, i: int) -> list[Any]:
        def read(path: str) -> list[Any]:
            batches = list(_read_batches(_map(path)))
            if batches:
                self._check_text_column(self.files[i], batches[0].schema)
            return batches

        with self._maps.lock:
            return self._maps.get(i, lambda: call(self.files[i], read))

    def _mappable(self, file: File) -> File:
        """Returns the file, with an uncompressed copy if it is compressed."""
        file = on_disk(file)

        def is_mappable(path: str) -> bool:
            mapped = _map(path)
            end = mapped.address + mapped.size
            return all(  # of all batches: a buffer is compressed only where that makes it shorter
                mapped.address <= buffer.address < end
                for batch in _read_batches(mapped)
                for column in batch.columns
                for buffer in column.buffers()
                if buffer is not None and buffer.size
            )

        def write(sink: Sink) -> None:
            batches = _read_batches(_map(file.content))
            first = next(batches)
            _write_batches(itertools.chain([first], batches), first.schema, sink)

        if call(file, is_mappable):
            return file
        return call(file, lambda _: converted(file, "uncompressed Arrow", write))


class Csv(Arrow):
    """CSV and TSV files with a header, whose fields are text, except for labels and margins."""

    def __init__(self, files: Sequence[File], field: str | None):
        """Converts the files to Arrow; `field` is the text column, None reads rows."""
        self._read = files
        super().__init__([_csv_as_arrow(file) for file in files], field)
        self.digest = samples_digest(files)

    def earlier_digest(self) -> str:
        return whole_digest(self._read)

    def row(self, index: int) -> dict[str, Any]:
        row = super().row(index)
        return row | {name: _number(row[name]) for name in _NUMBERS if name in row}

    def location(self, index: int) -> str:
        file, row = self.locate(index)
        return f"{self.files[file].path}, row {row + 1} after the header"


def _csv_as_arrow(file: File) -> File:
    delimiter = "\t" if file.name.lower().endswith(".tsv") else ","

    def write(sink: Sink) -> None:
        import pyarrow as pa

        csv.field_size_limit(MAX_RECORD_BYTES)
        with file.open() as opened:
            lines = io.TextIOWrapper(opened, "utf-8-sig", newline="")
            # Arrow's reader would take a quote that is never closed for text, up to the end of the file.
            reader = csv.reader(lines, delimiter=delimiter, strict=True)
            try:
                names = next(reader, [])
                if not names or len(set(names)) < len(names):
                    raise ValueError("its first line must name the columns, each otherwise")
                schema = pa.schema([(name, pa.string()) for name in names])
                _write_batches(_csv_batches(reader, schema), schema, sink)
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise DataError(
                    f"{file.path} is not UTF-8 (byte 0x{byte:02x}, {error.reason}); save it as UTF-8"
                ) from None
            except (csv.Error, ValueError) as error:
                if isinstance(error, DataError):
                    raise
                where = f"{file.path}:{max(reader.line_num, 1)}"
                raise DataError(
                    f"{where}: not CSV ({' '.join(str(error).split())[:120]}); correct it"
                ) from None

    return converted(file, f"CSV {delimiter!r} as Arrow", write)


def _csv_batches(rows: Iterator[list[str]], schema: Any) -> Iterator[Any]:
    """Yields record batches of the rows; a short row ends with empty fields.

    Raises:
      ValueError: for a row with more fields than the header.
    """
    import pyarrow as pa

    width, size = len(schema), 0
    part: list[list[str]] = []
    for row in itertools.chain(rows, [None]):
        if row is None or size > _CSV_BATCH_BYTES:
            columns = zip(*part, strict=True) if part else [()] * width
            yield pa.record_batch([pa.array(column, pa.string()) for column in columns], schema=schema)
            part, size = [], 0
        if not row:
            continue
        if len(row) > width:
            raise ValueError(f"{len(row)} fields, and the header has {width}")
        part.append(row + [""] * (width - len(row)))
        size += sum(map(len, row)) + width


def _number(text: Any) -> Any:
    """Returns the number that text spells, None for none, and other text as it is."""
    if not isinstance(text, str):
        return text
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text or None


def _map(path: str) -> Any:
    """Returns a file as a buffer in a memory map."""
    import pyarrow as pa

    with pa.memory_map(path) as mapped:
        return mapped.read_buffer()


def _read_batches(buffer: Any) -> Iterator[Any]:
    """Yields the record batches of a file in Arrow's file or stream format, without copying them."""
    import pyarrow as pa

    if buffer.slice(0, 6).to_pybytes() == b"ARROW1":
        reader = pa.ipc.open_file(pa.BufferReader(buffer))
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        with pa.ipc.open_stream(pa.BufferReader(buffer)) as stream:
            yield from stream


def _write_batches(batches: Iterable[Any], schema: Any, sink: Sink) -> None:
    import pyarrow as pa

    with pa.PythonFile(sink, mode="w") as opened, pa.ipc.new_stream(opened, schema) as writer:
        for batch in batches:
            batch.validate(full=True)  # the writer ends the process for some invalid ones
            writer.write_batch(batch)
