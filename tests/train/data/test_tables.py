"""Arrow, Parquet and CSV files of every column type that text comes in; folders of Hugging Face datasets."""

from __future__ import annotations

import datetime
import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from llama_jax.errors import DataError
from llama_jax.train.data import SourceConfig
from llama_jax.train.data import tables as tables_module
from llama_jax.train.data.records import BadRecord
from llama_jax.train.data.source import open_records
from tests.train.data.conftest import write_arrow, write_dataset
from tests.train.data.test_batches import assert_same, take
from tests.train.data.test_compressed import read

TEXTS = ["the fox", "", "naïve 🦙 " * 20, "the fox", "x\ny"]
CHAT = [
    {"role": "user", "content": "hi", "name": None},
    {"role": "assistant", "content": "é" * 30, "name": "fox"},
]
ROWS = [{"messages": CHAT[: i % 3], "label": i, "meta": {"k": [i, None]}, "text": f"t{i}"} for i in range(20)]


def rows_of(files: Any, **settings: object) -> list[dict[str, Any]]:
    records = open_records(SourceConfig(files, **settings), rows=True)
    return [records.row(i) for i in range(len(records))]


def stream(path: Path, table: pa.Table, compression: str | None = None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)


WRITE: dict[str, Callable[[Path, pa.Table], None]] = {
    "parquet": lambda path, table: pq.write_table(
        table, path, row_group_size=None if "view" in str(table.schema) else 3
    ),
    "arrow": stream,
    "compressed.arrow": lambda path, table: stream(path, table, "zstd"),
    "feather": lambda path, table: pa.feather.write_feather(table, str(path), chunksize=2),  # LZ4
    "file.arrow": lambda path, table: pa.feather.write_feather(table, str(path), "uncompressed", chunksize=2),
}
TYPES = {
    "string": pa.string(),
    "large string": pa.large_string(),
    "view": pa.string_view(),
    "bytes": pa.binary(),
    "large bytes": pa.large_binary(),
    "byte view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int8(), pa.string()),
    "large dictionary": pa.dictionary(pa.int32(), pa.large_string()),
}


@pytest.mark.parametrize("form", WRITE)
@pytest.mark.parametrize("kind", TYPES)
def test_text_of_any_type(tmp_path, form, kind):
    values = [text.encode() if "byte" in kind else text for text in TEXTS]
    column = pa.array([*values, None])
    column = (
        column.dictionary_encode().cast(TYPES[kind]) if "dictionary" in kind else column.cast(TYPES[kind])
    )
    nested = pa.string() if "view" in kind and form == "parquet" else column.type  # pyarrow cannot write it
    messages = pa.array([*([{"role": text}] for text in TEXTS), None], pa.list_(pa.struct({"role": nested})))
    table = pa.table({"id": range(6), "text": column, "messages": messages})
    path = tmp_path / f"a.{form}"
    WRITE[form](path, table)
    records = open_records(SourceConfig(str(path)))
    assert [records.text(i) for i in range(5)] == TEXTS
    with pytest.raises(BadRecord, match=r"row 5: field 'text' is null"):
        records.text(5)
    rows = rows_of(str(path))
    assert [row["text"] for row in rows] == [*TEXTS, None]
    assert [row["messages"] for row in rows] == [*([{"role": text}] for text in TEXTS), None]


@pytest.mark.parametrize("form", WRITE)
def test_nested_rows_in_several_chunks(tmp_path, form):
    WRITE[form](tmp_path / f"a.{form}", pa.Table.from_pylist(ROWS))
    assert rows_of(f"{tmp_path}/a.{form}") == ROWS


def test_a_nested_column_that_does_not_fit_into_one_chunk(tmp_path, monkeypatch):
    """Over 2 GB of text in a row group, for which Arrow raises: such a file is too large for a test."""
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    monkeypatch.setattr(tables_module, "_SMALL_BATCH", 3)

    class File(pq.ParquetFile):
        def read_row_group(self, *_: object, **__: object) -> None:
            raise pa.ArrowNotImplementedError(
                "Nested data conversions not implemented for chunked array outputs"
            )

    monkeypatch.setattr(pq, "ParquetFile", File)
    assert rows_of(f"{tmp_path}/a.parquet") == ROWS


@pytest.mark.parametrize("form", WRITE)
def test_columns_that_are_no_text(tmp_path, form):
    """Dates, decimals and bytes beside the text do no harm; `datasets.Json()` is parsed."""
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    jsons = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": [1]}', None]))
    columns = {
        "text": ["x", "y"],
        "ns": pa.array([1, None], pa.timestamp("ns")),
        "far": pa.array([10**18, 1], pa.timestamp("us")),
        "time": [now, None],
        "tools": pa.array([[1], [2]]),
        "json": jsons,
        "list": pa.ListArray.from_arrays([0, 1, 2], jsons),
    }
    WRITE[form](tmp_path / f"a.{form}", pa.table(columns))
    first, second = rows_of(f"{tmp_path}/a.{form}")
    assert first["text"], first["tools"] == ("x", [1])
    assert (first["json"], first["list"], second["json"]) == ({"a": [1]}, [{"a": [1]}], None)
    assert not isinstance(first["far"], str)


def test_bytes_that_are_not_utf8_are_a_bad_record(tmp_path):
    table = pa.table({"text": [b"good", b"\xff"], "id": [1, 2]})
    for form in ("parquet", "arrow"):
        WRITE[form](tmp_path / f"a.{form}", table)
        for rows in (False, True):
            records = open_records(SourceConfig(f"{tmp_path}/a.{form}"), rows=rows)
            assert records.row(0)["text"] == "good" if rows else records.text(0) == "good"
            with pytest.raises(BadRecord, match=rf"a\.{form}, row 1: not UTF-8"):
                _ = records.row(1) if rows else records.text(1)


def test_a_long_dictionary_is_no_long_record(tmp_path, monkeypatch):
    monkeypatch.setattr(tables_module, "MAX_RECORD_BYTES", 1000)
    text = pa.array([f"{i} " * 100 for i in range(20)]).dictionary_encode()
    WRITE["arrow"](tmp_path / "a.arrow", pa.table({"text": text}))
    assert len(rows_of(f"{tmp_path}/a.arrow")) == 20


@pytest.mark.parametrize("form", ["arrow", "feather", "file.arrow"])
def test_a_damaged_arrow_file(tmp_path, form):
    """Every error is one line, and nothing is read beyond the file's data."""
    path = tmp_path / f"a.{form}"
    WRITE[form](path, pa.Table.from_pylist(ROWS))
    data, draw = path.read_bytes(), random.Random(0)
    cases = [b"", b"ARROW1", b"text, and nothing else\n" * 99, data[:40], data[: len(data) // 2]]
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        cases.append(bytes(damaged))
    messages = []
    for case in cases:
        path.write_bytes(case)
        try:
            rows_of(str(path))
        except (DataError, BadRecord) as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all("\n" not in message and str(path) in message for message in messages)


# CSV


def test_csv_is_text_under_a_header(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b'\xef\xbb\xbftext,label,margin\r\n"a, ""b""\nc",0,0.5\r\n\r\n007,1,\r\nNA,x,1e3\r\n,2,-1'
    )
    assert read(f"{tmp_path}/a.csv") == ['a, "b"\nc', "007", "NA", ""]
    assert rows_of(f"{tmp_path}/a.csv") == [
        {"text": 'a, "b"\nc', "label": 0, "margin": 0.5},
        {"text": "007", "label": 1, "margin": None},
        {"text": "NA", "label": "x", "margin": 1000.0},
        {"text": "", "label": 2, "margin": -1},
    ]
    (tmp_path / "short.csv").write_text("id,text,x\n1,a,b\n2\n3,c")
    assert read(f"{tmp_path}/short.csv") == ["a", "", "c"]
    (tmp_path / "a.tsv").write_text("text\tid\none, two\t1\n")
    assert read(f"{tmp_path}/a.tsv") == ["one, two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.csv:1: not CSV \(its first line must name the columns"),
        (b"text\n", r"matches have no text"),
        (b"a,b\n1,2\n", r"a\.csv has no column 'text' \(columns: 'a', 'b'\); set data\.field"),
        (b"text,text\n1,2\n", r"a\.csv:1: not CSV \(its first line must name the columns, each otherwise"),
        (b"text,b\n1,2\n1,2,3\n4,5\n", r"a\.csv:3: not CSV \(3 fields, and the header has 2\); correct it"),
        (b"text,b\ncaf\xe9,2\n", r"a\.csv is not UTF-8 \(byte 0xe9, invalid continuation byte\); save it as"),
        (b'text\n"never\nclosed', r"a\.csv:3: not CSV \(unexpected end of data\)"),
    ],
)
def test_csv_that_cannot_be_read(tmp_path, opened, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as raised:
        opened(f"{tmp_path}/a.csv")
    assert "\n" not in str(raised.value)


# Folders that `datasets` saved; tests/parity/test_datasets.py compares with datasets itself


def test_a_saved_dataset_is_read_in_its_own_order(tmp_path):
    folder = write_dataset(tmp_path / "d[1]", ROWS)
    assert rows_of(folder) == ROWS
    assert rows_of(f"{folder}/") == ROWS
    state = json.loads(Path(folder, "state.json").read_text())
    state["_data_files"].reverse()
    Path(folder, "state.json").write_text(json.dumps(state))
    assert rows_of(folder) == ROWS[10:] + ROWS[:10]


def test_globs_leave_a_datasets_metadata_out(tmp_path):
    for name, rows in (("b", ROWS[10:]), ("a", ROWS[:10])):
        write_dataset(tmp_path / "sets" / name, rows)
    assert rows_of(f"{tmp_path}/sets/**/*") == ROWS
    assert rows_of(f"{tmp_path}/sets/*") == ROWS
    assert rows_of((f"{tmp_path}/sets/b", f"{tmp_path}/sets/a")) == ROWS[10:] + ROWS[:10]
    for name in ("state.json", "dataset_info.json"):
        with pytest.raises(
            DataError, match=rf"a/{name} describes a Hugging Face dataset; to read it use '(.*)'"
        ):
            rows_of(f"{tmp_path}/sets/a/{name}")


def test_a_moved_or_renamed_dataset_gives_the_same_batches(tmp_path, opened, texts):
    data = opened(write_arrow(tmp_path / "a" / "x", texts))
    moved = opened(str(shutil.copytree(tmp_path / "a" / "x", tmp_path / "y")))
    assert moved.fingerprint == data.fingerprint
    assert_same(take(moved.train(), 5), take(data.train(), 5))


def test_a_dataset_dict_stands_for_its_training_split(tmp_path):
    for name, rows in (("train", ROWS[:15]), ("test", ROWS[15:])):
        write_dataset(tmp_path / "d" / name, rows)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert rows_of(f"{tmp_path}/d") == ROWS[:15]
    assert rows_of(f"{tmp_path}/d/test") == ROWS[15:]
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    with pytest.raises(DataError, match=r"/d has no split 'train'; use '(.*)'$") as raised:
        rows_of(f"{tmp_path}/d")
    assert rows_of(str(raised.value).split("'")[-2]) == ROWS[15:]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("[]", r"state\.json is not a JSON object; save the dataset again"),
        ("{" * 9, r"state\.json is not JSON"),
        ("[" * 100_000, r"state\.json is not JSON"),
        ("{}", r"state\.json has no list of data files"),
        ('{"_data_files": []}', r"/d is a dataset without rows"),
        ('{"_data_files": [{"filename": "../../secret.arrow"}]}', r"state\.json has no list of data files"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', r"state\.json has no list of data files"),
        ('{"_data_files": {"filename": "a"}}', r"state\.json has no list of data files"),
        (
            '{"_data_files": [{"filename": "gone.arrow"}]}',
            r"gone\.arrow does not exist, and state\.json names it",
        ),
        (
            '{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}',
            r"again after \.flatten_indices\(\)",
        ),
    ],
)
def test_a_damaged_dataset_folder(tmp_path, state, message):
    folder = Path(write_dataset(tmp_path / "d", ROWS))
    (folder / "state.json").write_text(state)
    with pytest.raises(DataError, match=message) as raised:
        rows_of(str(folder))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("names", "glob"),
    [
        (["a.jsonl", "b.jsonl", "dataset_info.json", "README.rst"], "/**/*.jsonl"),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "/**/*train*.parquet"),
        (["x/a.jsonl.gz", "x/b.jsonl.gz", "notes.md"], "/**/*.jsonl.gz"),
        (["a.py", "b/c.py"], "/**/*"),
    ],
)
def test_the_advice_for_another_folder_works(tmp_path, names: Sequence[str], glob):
    for name in names:
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"text": [name]}), path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n")
            if path.suffix == ".gz":
                path.write_bytes(__import__("gzip").compress(path.read_bytes()))
    with pytest.raises(
        DataError, match=r"/d' is a directory, and neither .*; to match its files use '"
    ) as raised:
        read(f"{tmp_path}/d")
    advice = str(raised.value).split("'")[-2]
    assert advice == f"{tmp_path}/d{glob}"
    found = read(advice)
    assert found
    assert not any("test" in text or "README" in text or "features" in text for text in found)
