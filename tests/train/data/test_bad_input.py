"""Every error in the data is one line with the cause, the location and the fix."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from llama_jax.errors import ConfigError, DataError
from llama_jax.train.data import DataConfig, SourceConfig, train_texts
from tests.train.data.conftest import write_arrayrecord, write_jsonl, write_parquet, write_text
from tests.train.data.test_batches import take

GOOD = [f"a good document, number {i}, of some length " * 3 for i in range(20)]


def assert_refused(message, call, kind=DataError):
    with pytest.raises(kind, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


# Configuration


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "josnl"}, r"data\.format is 'josnl'; did you mean jsonl\?; it must be one of auto, text"),
        ({"files": 3}, r"data\.files is 3; use a file, or a glob"),
        ({"field": ""}, r"data\.field is ''; use the name of the field"),
        ({"exclude": [1]}, r"data\.exclude is \[1\]; use a list of patterns"),
        (
            {"validation_fraction": 1.0},
            r"data\.validation_fraction is 1\.0; it must be at least 0",
        ),
        ({"validation_fraction": -0.1}, r"data\.validation_fraction is -0\.1; it must be"),
        ({"validation_fraction": "half"}, r"data\.validation_fraction is 'half'; it must be"),
        ({"bad_records": "skipp"}, r"data\.bad_records is 'skipp'; did you mean skip\?"),
        ({"shuffle": 1}, r"data\.shuffle is 1; it must be true or false"),
        ({"workers": -1}, r"data\.workers is -1; it must be a whole number, at least 0"),
        (
            {"mixture": (SourceConfig("b"),)},
            r"data\.files is 'a' and data\.mixture is set too; set one of them",
        ),
    ],
)
def test_invalid_settings(settings, message):
    assert_refused(message, lambda: DataConfig(**{"files": "a", **settings}), ConfigError)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2", True])
def test_invalid_weights(weight):
    message = r"data\.weight is .* \(files 'x'\); it must be a finite number above 0"
    assert_refused(message, lambda: SourceConfig("x", weight=weight), ConfigError)


def test_no_data_at_all(opened):
    assert_refused(r"data\.files is ''; use a file, or a glob", opened, ConfigError)


def test_a_batch_size_that_processes_do_not_divide(opened, corpora):
    message = r"train\.global_batch_size is 4, which 3 processes do not divide; make it a multiple"
    assert_refused(message, lambda: opened(corpora["text"], process_count=3), ConfigError)
    for name, key in (("batch_size", "global_batch_size"), ("seq_len", "seq_len")):
        message = rf"train\.{key} is 0; it must be"
        assert_refused(message, lambda n=name: opened("x", **{n: 0}), ConfigError)


# Files


def test_a_glob_that_matches_nothing(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = re.escape(str(tmp_path))
    assert_refused(
        rf"no file matches data\.files = 'x/\*\.txt' \(relative to {where}\)", lambda: opened("x/*.txt")
    )
    assert_refused(r"no file matches data\.files = '/none/x'; check the path", lambda: opened("/none/x"))
    (tmp_path / "folder").mkdir()
    assert_refused(r"'folder' is a directory, .*: it has no files; check the path", lambda: opened("folder"))
    (tmp_path / "folder" / "a.py").write_text("x = 1\n" * 100)
    assert_refused(
        r"'folder' is a directory, .*; to match its files use 'folder/\*\*/\*'", lambda: opened("folder")
    )
    assert_refused(r"folder/tokens\.json cannot be read", lambda: opened("folder", format="tokens"))


def test_excluding_everything(opened, corpora):
    message = r"data\.exclude leaves none of the 60 files that .* matches; exclude fewer"
    assert_refused(message, lambda: opened(corpora["text"], exclude=["*.txt"]))


def test_files_of_several_formats(opened, tmp_path):
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text("x")
    message = r"several formats \(text: a\.txt, jsonl: b\.jsonl\); narrow it, set data\.format"
    assert_refused(message, lambda: opened(f"{tmp_path}/*"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_files_without_text(opened, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert_refused(r"the files that '.*' matches have no text", lambda: opened(str(tmp_path / name)))


def test_documents_without_text(opened, tmp_path):
    files = write_parquet(tmp_path / "p", ["", "", ""])
    assert_refused(r"none of the 3 records of '.*' has usable text", lambda: opened(files))
    files = write_arrayrecord(tmp_path / "a", [])
    assert_refused(r"matches have no text", lambda: opened(files))


def test_too_little_for_one_sequence(opened, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("the fox")
    count = len(tokenizer.encode("the fox", add_bos=True, add_eos=True))
    message = (
        rf"has {count} tokens to train on \(1 documents\), and one sequence needs 64; .* at most {count}$"
    )
    assert_refused(message, lambda: opened(str(tmp_path / "a.txt")))
    assert next(opened(str(tmp_path / "a.txt"), seq_len=count).train())["tokens"].shape == (4, count)


def test_a_text_file_that_is_not_utf8(opened, tmp_path):
    write_text(tmp_path / "t", GOOD)
    (tmp_path / "t" / "000.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    files = f"{tmp_path}/t/*.txt"
    message = r"000\.txt:3: not UTF-8 \(byte 0xff, invalid start byte\); fix it, or set data\.bad_records"
    assert_refused(message, lambda: take(opened(files, validation_fraction=0).train(), 40))
    batches = opened(files, validation_fraction=0, bad_records="skip").train()
    take(batches, 40)
    assert set(batches.skipped) == {"not UTF-8"}


@pytest.mark.parametrize(
    ("line", "message", "reason"),
    [
        (b"{", r"not JSON \(Expecting property name", "not JSON"),
        (b"[" * 100_000, r"not JSON \(maximum recursion", "not JSON"),
        (b'{"text": "caf\xe9"}', r"not UTF-8 \(byte 0xe9", "not UTF-8"),
        (b'["text"]', "a JSON list, not an object", "not an object"),
        (b'{"txt": "a", "b": 1}', r"no field 'text' \(fields: 'txt', 'b'\)", "no such field"),
        (b'{"text": 3}', "field 'text' is of type int, not text", "field is not text"),
        (b'{"text": null}', "field 'text' is of type NoneType", "field is not text"),
    ],
)
def test_a_bad_json_line(opened, tmp_path, line, message, reason):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    path.write_bytes(b"\n\n".join([*lines[:7], line, *lines[7:]]))
    rest = r'; fix it, or set data\.bad_records = "skip"$'
    assert_refused(
        rf"a\.jsonl:15: {message}.*{rest}", lambda: take(opened(str(path), validation_fraction=0).train(), 50)
    )
    assert_refused(message, lambda: list(train_texts(DataConfig(str(path), validation_fraction=0))))
    assert len(list(train_texts(DataConfig(str(path), validation_fraction=0, bad_records="skip")))) == len(
        GOOD
    )
    batches = opened(str(path), validation_fraction=0, bad_records="skip").train()
    take(batches, 50)
    assert batches.skipped[reason] >= 2  # one an epoch
    again = opened(str(path), validation_fraction=0, bad_records="skip").train()
    again.restore([json.loads(json.dumps(batches.state()))])
    assert again.skipped == batches.skipped


def test_a_lone_surrogate(opened, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800"}\n' + "\n".join(json.dumps({"text": text}) for text in GOOD))
    message = r"a\.jsonl, record 0: the text has a lone surrogate; fix it"
    assert_refused(message, lambda: take(opened(str(path), validation_fraction=0).train(), 50))


def test_an_overlong_line(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("llama_jax.train.data.lines.MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 3000}) + "\n" + json.dumps({"text": "y" * 500}))
    message = r"a\.jsonl:1: the line has 3013 bytes, more than 1000"
    assert_refused(message, lambda: take(opened(str(path), validation_fraction=0).train(), 50))


def test_nothing_but_bad_records(opened, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("{\n" * 10)
    message = r'none of the 10 records of .* has usable text; data\.bad_records is "skip": set it to "fail"'
    assert_refused(message, lambda: opened(str(path), bad_records="skip"))
    assert_refused(r"a\.jsonl:\d+: not JSON", lambda: opened(str(path)))


def test_a_lane_of_nothing_but_bad_records(opened, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": GOOD[0]}) if i % 2 else "{" for i in range(10)))
    batches = opened(
        str(path), validation_fraction=0, bad_records="skip", shuffle=False, batch_size=2
    ).train()
    message = r"1010 consecutive records have no usable text \(skipped: 1010 not JSON\); check the data"
    assert_refused(message, lambda: next(batches))


def test_parquet_without_the_column(opened, tmp_path):
    files = write_parquet(tmp_path / "p", GOOD)
    message = r"a\.parquet has no column 'body' \(columns: 'id', 'text'\); set data\.field"
    assert_refused(message, lambda: opened(files, field="body"))
    assert_refused(r"column 'id' is of type int64, not string", lambda: opened(files, field="id"))


def test_parquet_with_a_null(opened, tmp_path):
    files = write_parquet(tmp_path / "p", [*GOOD, None])
    message = r"b\.parquet, row 10: field 'text' is null; fix it"
    assert_refused(message, lambda: take(opened(files, validation_fraction=0).train(), 50))
    take(opened(files, validation_fraction=0, bad_records="skip").train(), 50)


@pytest.mark.parametrize("name", ["parquet", "arrayrecord"])
@pytest.mark.parametrize("damage", ["empty", "cut", "other", "flipped"])
def test_a_damaged_table(opened, tmp_path, name, damage):
    write = {"parquet": write_parquet, "arrayrecord": write_arrayrecord}[name]
    folder = tmp_path / "t"
    files = write(folder, GOOD * 20)
    path = folder / f"a.{name}"
    data = bytearray(path.read_bytes())
    middle = 65_600 if name == "arrayrecord" else 20
    flipped = (
        data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 400]) + data[middle + 400 :]
    )
    damaged = {
        "empty": b"",
        "cut": data[:-100],
        "other": b"text, and nothing else\n" * 9000,
        "flipped": flipped,
    }
    path.write_bytes(damaged[damage])
    message = rf"a\.{name} cannot be read \(.*\); copy it again"
    assert_refused(message, lambda: take(opened(files, validation_fraction=0).train(), 200))


@pytest.mark.parametrize("write", [write_text, write_jsonl, write_parquet, write_arrayrecord])
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_file_that_is_deleted_or_changed_during_the_run(opened, tmp_path, write, how):
    files = write(tmp_path / "t", GOOD)
    batches = opened(files, validation_fraction=0).train()
    next(batches)
    for path in Path(tmp_path / "t").iterdir():
        if how == "gone":
            path.unlink()
        else:
            os.utime(path, ns=(1, 1))
    message = {
        "gone": r"can no longer be read \(No such file",
        "changed": "changed during the run",
    }
    assert_refused(message[how], lambda: take(batches, 100))


@pytest.mark.slow
def test_the_same_error_from_a_worker_process(opened, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*(json.dumps({"text": text}) for text in GOOD), "{"]))
    batches = opened(str(path), validation_fraction=0, workers=1).train()
    message = r'^\S*a\.jsonl:21: not JSON \(.*\); fix it, or set data\.bad_records = "skip"$'
    assert_refused(message, lambda: take(batches, 100))
    batches.close()


def test_validation_records_are_checked_too(opened, tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"text": GOOD[0]})
    path.write_text("\n".join([good] * 20))
    bad = int(opened(str(path), validation_fraction=0.5)._parts[0].validation_index[-1])
    path.write_text("\n".join(good if i != bad else "{" for i in range(20)))
    # Before the first step: the first evaluation would end the run.
    assert_refused(rf"a\.jsonl:{bad + 1}: not JSON", lambda: opened(str(path), validation_fraction=0.5))
    assert list(opened(str(path), validation_fraction=0.5, bad_records="skip").validation_batches())
