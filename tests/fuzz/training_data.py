"""Fuzzing targets of training data: valid files of records, one of which the fuzzer's bytes replace."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import DataError
from llama_jax.train.config.data import SourceConfig
from llama_jax.train.data import cache
from llama_jax.train.data.records import BadRecord
from llama_jax.train.data.source import open_records

ROWS = [{"text": "the cat", "messages": [{"role": "user", "content": f"{i} é"}], "n": i} for i in range(12)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@contextlib.contextmanager
def _own_cache() -> Iterator[None]:
    """Decompressed copies in a folder of their own, which goes: each input is another file."""
    before = os.environ.get("LLAMA_JAX_CACHE")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        os.environ["LLAMA_JAX_CACHE"] = folder
        try:
            yield
        finally:
            for descriptor, _ in cache._claimed.values():
                os.close(descriptor)
            cache._claimed.clear()
            if before is None:
                del os.environ["LLAMA_JAX_CACHE"]
            else:
                os.environ["LLAMA_JAX_CACHE"] = before


def read(path: Path, *, files: str) -> None:
    """Opens the records of a folder as texts and as rows, and reads each; raises DataError for a bad one."""
    for rows in (False, True):
        with _own_cache():
            records = open_records(SourceConfig(str(path / files).rstrip("/")), rows=rows)
            if not len(records):
                raise DataError("there are no records")
            try:
                for i in range(min(len(records), 50)):
                    records.row(i) if rows else records.text(i)
            except BadRecord as bad:
                raise DataError(bad.message) from None


def _write(path: Path, name: str, data: bytes) -> None:
    path.mkdir()
    (path / name).write_bytes(data)


def _write_dataset(path: Path, *, compression: str | None = None) -> None:
    """What `Dataset.save_to_disk` writes."""
    import pyarrow as pa

    path.mkdir()
    table = pa.Table.from_pylist(ROWS)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (
        pa.OSFile(str(path / "a.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema, options=options) as writer,
    ):
        writer.write_table(table, max_chunksize=5)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    (path / "dataset_info.json").write_text(json.dumps({"features": {}}))


def _write_parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), path / "a.parquet", row_group_size=5)


CSV = b"id,text\n" + b"".join(b'%d,"a ""b"" c"\n' % i for i in range(12))
# Name: what writes the files, the one to replace, and the glob that opens them ("" is the folder).
TARGETS = {
    "data-jsonl": (functools.partial(_write, name="a.jsonl", data=LINES), "a.jsonl", "a.jsonl"),
    "data-json": (
        functools.partial(_write, name="a.json", data=json.dumps(ROWS, indent=1).encode()),
        "a.json",
        "a.json",
    ),
    "data-gzip": (
        functools.partial(_write, name="a.jsonl.gz", data=gzip.compress(LINES, mtime=0)),
        "a.jsonl.gz",
        "a.jsonl.gz",
    ),
    "data-csv": (functools.partial(_write, name="a.csv", data=CSV), "a.csv", "a.csv"),
    "data-arrow": (_write_dataset, "a.arrow", "a.arrow"),
    "data-dataset": (_write_dataset, "state.json", ""),
    "data-parquet": (_write_parquet, "a.parquet", "a.parquet"),
}
