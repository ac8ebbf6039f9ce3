"""Lists of globs, in TOML, in Python and as flags; files that are no text; line ends and encodings."""

from __future__ import annotations

import codecs
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llama_jax.errors import ConfigError, DataError
from llama_jax.train.config.data import DataConfig, SourceConfig
from llama_jax.train.config.read import load_config, to_toml
from llama_jax.train.data.source import open_records
from tests.train.data.conftest import prepared, write_gzip, write_jsonl, write_parquet, write_text
from tests.train.data.test_batches import assert_same, take
from tests.train.data.test_compressed import read
from tests.train.data.test_sources import small_windows

# Lists in the configuration


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("a/*.jsonl", "a/*.jsonl"),
        ("a.jsonl,b.parquet", ("a.jsonl", "b.parquet")),
        ("a.jsonl, b.jsonl,", ("a.jsonl", "b.jsonl")),
        ('["a,b.jsonl", "c.jsonl"]', ("a,b.jsonl", "c.jsonl")),
        ("['a.jsonl']", "a.jsonl"),
        ("[ab]*.jsonl", "[ab]*.jsonl"),
        ("[1]", "[1]"),
        ("here,there.txt", "here,there.txt"),  # a file of this name exists
    ],
)
@pytest.mark.parametrize("key", ["files", "validation_files"])
def test_lists_on_the_command_line(tmp_path, monkeypatch, flag, expected, key):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here,there.txt").write_text("x")
    (tmp_path / "run.toml").write_text("")
    run = load_config("run.toml", [f"--data.{key}", flag])
    assert getattr(run.data, key) == expected
    (tmp_path / "again.toml").write_text(to_toml(run))  # as a run directory keeps it
    assert load_config("again.toml").data == run.data


def test_lists_in_toml(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[[data.mixture]]\nfiles = ["a", "b"]\n[[data.mixture]]\nfiles = "c"')
    assert [source.files for source in load_config(path).data.sources] == [("a", "b"), "c"]
    path.write_text('[data]\nfiles = ["a"]\nvalidation_files = ["b", "c"]')
    data = load_config(path).data
    assert (data.files, data.validation_files) == ("a", ("b", "c"))
    for bad in ("[]", '["a", ""]', '["a", 3]'):
        path.write_text(f"[data]\nfiles = {bad}")
        with pytest.raises(ConfigError, match=r"data\.files"):
            load_config(path)


# Lists of files


def test_a_list_of_one_format_equals_a_glob(tmp_path, opened, texts):
    files = write_jsonl(tmp_path / "d", texts)
    a, b = f"{tmp_path}/d/a.jsonl", f"{tmp_path}/d/b.jsonl"
    whole, listed = opened(files), opened([a, b])
    assert listed.fingerprint == whole.fingerprint
    assert_same(take(listed.train(), 5), take(whole.train(), 5))
    assert read((b, a)) == texts[30:] + texts[:30]
    assert read((a, a)) == texts[:30] * 2  # as `datasets` does


def test_a_list_of_several_formats(tmp_path, opened, texts, tokenizer):
    files = (
        write_parquet(tmp_path / "p", texts[:20]),
        write_gzip(tmp_path / "g", texts[20:40]),
        write_text(tmp_path / "t", texts[40:]),
    )
    assert read(files) == texts
    data = opened(files, validation_fraction=0.2)
    batches = data.train()
    first = take(batches, 4)
    again = opened(files, validation_fraction=0.2).train()
    again.restore([json.loads(json.dumps(batches.state()))])
    assert_same(take(again, 4), take(batches, 4))
    halves = [
        opened(files, validation_fraction=0.2, process_index=i, process_count=2).train() for i in range(2)
    ]
    for batch, *parts in zip(first, *(take(half, 4) for half in halves), strict=True):
        np.testing.assert_array_equal(batch["tokens"], np.concatenate([part["tokens"] for part in parts]))
    prepared(tmp_path / "tokens", tokenizer, files, validation_fraction=0.2)
    tokens = opened(str(tmp_path / "tokens"), validation_fraction=0.2)
    assert tokens.fingerprint == data.fingerprint
    assert_same(take(tokens.train(), 4), first)
    records = pickle.loads(pickle.dumps(open_records(SourceConfig(files))))  # as sent to a worker process
    assert records.text(59) == texts[59] and records.location(20) == f"{tmp_path}/g/a.jsonl.gz:1"


@pytest.mark.parametrize("window", [2, 100])
def test_a_mixed_list_is_shuffled_as_a_whole(tmp_path, opened, texts, window, monkeypatch):
    small_windows(monkeypatch, window)
    files = (write_parquet(tmp_path / "p", texts[:30]), write_jsonl(tmp_path / "j", texts[30:]))
    (order,) = opened(files, validation_fraction=0, batch_size=1)._mixture(3).orders
    epochs = [[tuple(order[i]) for i in range(first, first + 60)] for first in (0, 60)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert len(set(epochs[0])) == 60
    assert epochs[0] != epochs[1]


def test_what_a_list_names_must_exist(tmp_path, opened, texts, corpora):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    a = f"{tmp_path}/a.jsonl"
    with pytest.raises(DataError, match=r"no file matches data\.files = '\S+/nope\*'; check the path"):
        opened([a, f"{tmp_path}/nope*"])
    with pytest.raises(DataError, match=r"no file matches data\.validation_files = '\S+/nope\*'"):
        opened(corpora["text"], validation_files=[a, f"{tmp_path}/nope*"])
    with pytest.raises(DataError, match=r"a\.jsonl is in data\.validation_files and in the training files"):
        opened([corpora["jsonl"], a], validation_files=[a])


def test_token_ids_stand_alone(tmp_path, opened, corpora, tokenizer):
    prepared(tmp_path / "t", tokenizer, corpora["text"])
    with pytest.raises(
        DataError, match=r"has a folder of token ids, which must stand alone: .* \[\[data\.mixture"
    ):
        opened([str(tmp_path / "t"), corpora["jsonl"]])


def test_a_path_with_brackets_is_no_glob(tmp_path, opened):
    (tmp_path / "d[1]").mkdir()
    (tmp_path / "d[1]" / "a[b].txt").write_text("text")
    assert read(f"{tmp_path}/d[1]/a[b].txt") == ["text"]
    with pytest.raises(DataError, match=r"in a glob the bracket \[ is written \[\[\]$"):
        opened(f"{tmp_path}/d[1]/*.txt")
    assert read(f"{tmp_path}/d[[]1]/*.txt") == ["text"]


# Files that are no text


def npy() -> bytes:
    np.save(out := io.BytesIO(), np.arange(9))
    return out.getvalue()


def zipped() -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        archive.writestr("a.txt", "text")
    return out.getvalue()


def tar(mode: str) -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode=mode) as archive:
        archive.addfile(info := tarfile.TarInfo("a.txt"))
        assert info.size == 0
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.bin", np.arange(100, dtype=np.uint16).tobytes(), "holds numbers, not text"),
        ("a.npy", npy(), "holds numbers, not text"),
        ("a", npy(), "holds numbers, not text"),
        ("a.pkl", pickle.dumps(["a"], 0), "is a pickle, which can run any code"),
        ("a.data", pickle.dumps(["a"]), "is a pickle, which can run any code"),
        ("a.zip", zipped(), "is a .zip archive; unpack it"),
        ("a.txt", zipped(), "is a zip archive; unpack it"),
        ("a.tar", tar("w"), "is a .tar archive; unpack it"),
        ("a.tar.gz", tar("w:gz"), "is a .tar archive; unpack it"),
        ("a.tgz", tar("w:gz"), "is a .tgz archive; unpack it"),
        ("a.jsonl", tar("w:gz"), "is a tar archive; unpack it"),
        ("a.txt", b"PAR1" + bytes(99), "is a Parquet file; name it .parquet, or set data.format"),
        ("a.md", b"some\0thing", "is not text (it has a byte 0)"),
        ("a.xlsx", b"x", "is a table; write it as CSV"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "bytes",  # archives hold the time
)
def test_binary_files_are_not_trained_on(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "good").write_text("good")
    with pytest.raises(DataError) as raised:
        open_records(SourceConfig(f"{tmp_path}/*" if name != "a.jsonl" else f"{tmp_path}/{name}"))
    assert f"{tmp_path}/{name} {message}" in str(raised.value)
    assert "\n" not in str(raised.value)
    if "data.exclude" in str(raised.value):  # the way out
        exclude = str(raised.value).partition('["')[2].partition('"]')[0]
        assert read(f"{tmp_path}/*", exclude=[exclude]) == ["good"]


def test_format_text_reads_what_only_looks_binary(tmp_path):
    (tmp_path / "a.bin").write_text("words")
    (tmp_path / "b.csv").write_text("a,b\n1\0,2\n")
    assert read(f"{tmp_path}/*", format="text") == ["words", "a,b\n1\0,2\n"]


# Line ends and encodings

LINES = ["a\u2028b\u2029c\x85d\x0ce", "", "é🦙", "last"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r\n \r\n"], ids=repr)
@pytest.mark.parametrize("mark", ["", "\ufeff", "twice"], ids=repr)
@pytest.mark.parametrize("last", [True, False])
def test_json_lines_however_they_end(tmp_path, end, mark, last):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in LINES]
    content = (end if last else "").join(["", end.join(lines)][::-1])
    whole = (
        "\ufeff" + content + ("" if last else end) + "\ufeff" + content if mark == "twice" else mark + content
    )
    (tmp_path / "a.jsonl").write_text(whole, encoding="utf-8", newline="")
    assert read(f"{tmp_path}/a.jsonl") == LINES * (2 if mark == "twice" else 1)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "txt", "csv"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf16_with_its_mark_is_read(tmp_path, suffix, encoding):
    rows = [{"text": text} for text in LINES]
    content = {
        "jsonl": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "json": json.dumps(rows, ensure_ascii=False),
        "txt": "one\r\ntwo",
        "csv": "id,text\r\n" + "\r\n".join(f'{i},"{text}"' for i, text in enumerate(LINES)),
    }[suffix]
    (tmp_path / f"a.{suffix}").write_bytes(f"\ufeff{content}".encode(encoding))
    assert read(f"{tmp_path}/a.{suffix}") == (["one\r\ntwo"] if suffix == "txt" else LINES)


def test_a_mark_without_utf16(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF16_LE + b"odd")
    with pytest.raises(
        DataError, match=r"a\.txt begins like UTF-16 and is not \(truncated data\); copy it again"
    ):
        read(f"{tmp_path}/a.txt")


def test_files_keep_their_line_ends(tmp_path):
    Path(tmp_path / "a.txt").write_bytes(b"one\r\n\r\ntwo")
    assert read(f"{tmp_path}/a.txt") == ["one\r\n\r\ntwo"]
    assert DataConfig(files=[f"{tmp_path}/a.txt"]).files == f"{tmp_path}/a.txt"
