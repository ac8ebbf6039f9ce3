"""The index of text and JSON files: the same records however it is made, made once, and verified."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from llama_jax.errors import DataError
from llama_jax.train.data import DataConfig, SourceConfig, index_making, indexing, pieces, source
from llama_jax.train.data import index as index_module
from llama_jax.train.data.compression import Plain
from llama_jax.train.data.encode import Encoder
from llama_jax.train.data.files import INDEX_FOLDER, File
from llama_jax.train.data.lines import JsonLines
from tests.train.data.test_batches import assert_same, take

BLOCK = 64  # bytes, so that lines and units are cut everywhere


@pytest.fixture
def small(monkeypatch):
    """Blocks and units of a few bytes, and an index on disk for the smallest files."""
    monkeypatch.setattr(pieces, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(index_making, "UNIT_BYTES", 2 * BLOCK)
    monkeypatch.setattr(indexing, "FILE_BYTES", 1)
    monkeypatch.setattr(index_making, "FILE_BYTES", 1)
    monkeypatch.setattr(indexing, "SMALL_BYTES", 0)
    monkeypatch.setattr(index_making, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # of a hundred parts


def reference(data: bytes) -> list[tuple[int, int]]:
    """The spans of the lines that are not blank."""
    spans, start = [], 3 if data.startswith(b"\xef\xbb\xbf") else 0
    for line in data[start:].splitlines(keepends=True) if b"\r" not in data else []:
        if line.strip():
            spans.append((start, len(line)))
        start += len(line)
    return spans


def spans(records: JsonLines) -> list[tuple[int, int]]:
    return [records._span(i)[1:] for i in range(len(records))]


def stated(path: Path) -> File:
    info = path.stat()
    return File(str(path), path.name, info.st_size, info.st_mtime_ns)


def index_of(folder: Path) -> Path:
    (path,) = folder.glob(f"{INDEX_FOLDER}/*.index")
    return path


@pytest.mark.parametrize("seed", range(12))
def test_lines_are_found_wherever_blocks_units_and_files_end(tmp_path, small, seed):
    chance = random.Random(seed)
    files, expected = [], []
    for i in range(chance.choice((1, 3))):
        lines = [
            b" " * chance.choice((0, 0, 1, 9)) + b"x" * chance.choice((0, 0, 1, 5, 63, 64, 65, 200, 700))
            for _ in range(chance.choice((0, 1, 5, 90)))
        ]
        data = chance.choice((b"", b"\xef\xbb\xbf")) + b"\n".join(lines) + chance.choice((b"", b"\n", b" \n"))
        path = tmp_path / f"{i}.jsonl"
        path.write_bytes(data)
        files.append(stated(path))
        expected += reference(data)
    if not any(file.size for file in files):
        return
    records = JsonLines(files, Plain("jsonl", True), "text")
    assert spans(records) == expected
    assert records.nbytes == sum(length for _, length in expected)
    again = pickle.loads(pickle.dumps(records))  # from disk, as a worker process has it
    assert spans(again) == expected
    assert len(pickle.dumps(records._index)) < 500


@pytest.mark.parametrize("kind", ["text", "jsonl", "array", "gzip", "mixed"])
def test_an_index_on_disk_gives_the_batches_of_one_in_memory(tmp_path, opened, texts, monkeypatch, kind):
    rows = [json.dumps({"text": text}) for text in texts]
    contents = {
        "text": ("a.txt", "\n".join(texts * 40).encode()),
        "jsonl": ("a.jsonl", "\n\n".join(rows).encode()),
        "array": ("a.json", b"\xef\xbb\xbf[" + ",\n ".join(rows).encode() + b" ]"),
        "gzip": ("a.jsonl.gz", gzip.compress("\n".join(rows).encode())),
    }
    chosen = contents.values() if kind == "mixed" else [contents[kind]]
    for name, content in chosen:
        (tmp_path / name).write_bytes(content)
    files = [str(tmp_path / name) for name, _ in chosen]
    whole = opened(files)
    expected = take(whole.train(), 5)
    monkeypatch.setattr(indexing, "SMALL_BYTES", 0)
    for _ in range(2):  # made, and found
        data = opened(files)
        assert data.fingerprint == whole.fingerprint
        assert_same(take(data.train(), 5), expected)
    assert not list((tmp_path / INDEX_FOLDER).glob("*.*.*"))
    assert len(list((tmp_path / INDEX_FOLDER).glob("*.index"))) == (2 if kind == "mixed" else 1)
    for wildcard in ("*", "**/*") if kind != "mixed" else ():  # do not match it
        assert opened(f"{tmp_path}/{wildcard}").records == whole.records


def write(folder: Path, rows: int = 100) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {i} " * (i % 7)}) + "\n" for i in range(rows)))
    return path


def test_it_is_made_once_by_several_threads_and_never_again(tmp_path, small, monkeypatch):
    path = write(tmp_path)
    scanned: list[tuple[int, int]] = []
    real = index_making.write_part

    def write_part(out, unit, *args, **more):
        scanned.extend((place.start, place.end) for place in unit)
        real(out, unit, *args, **more)

    monkeypatch.setattr(index_making, "write_part", write_part)
    found: list[JsonLines] = []
    threads = [
        threading.Thread(target=lambda: found.append(JsonLines([stated(path)], Plain("jsonl", True), "text")))
        for _ in range(3)  # as processes: their locks are of open files
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and all(spans(records) == reference(path.read_bytes()) for records in found)
    assert sorted(scanned) == sorted(set(scanned))  # no unit twice
    scanned.clear()
    reads: list[int] = []
    monkeypatch.setattr(File, "read", lambda *_: reads.append(1))
    JsonLines([stated(path)], Plain("jsonl", True), "text")
    assert not scanned and not reads


SCRIPT = """
import sys, os
from llama_jax.train.data import index_making, indexing, pieces
from llama_jax.train.data.compression import Plain
from llama_jax.train.data.files import File
from llama_jax.train.data.lines import JsonLines
pieces.BLOCK_BYTES, index_making.UNIT_BYTES, indexing.SMALL_BYTES = 64, 128, 0
real, path, calls = index_making.write_part, sys.argv[1], []
def write_part(out, unit, *args, **more):
    if len(calls) == int(sys.argv[2]):
        print("waiting", flush=True)
        sys.stdin.read()
    calls.append(unit)
    real(out, unit, *args, **more)
index_making.write_part, index_making._MAX_THREADS = write_part, 1
info = os.stat(path)
JsonLines([File(path, "a.jsonl", info.st_size, info.st_mtime_ns)], Plain("jsonl", True), "text")
"""


def test_what_a_killed_process_has_done_is_not_done_again(tmp_path, small, monkeypatch):
    path = write(tmp_path, 300)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path), "40"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"waiting\n"  # it holds a lock
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (build,) = (tmp_path / INDEX_FOLDER).iterdir()
    done = {part.stem: part.stat().st_ino for part in build.glob("*.part")}
    assert len(done) == 40
    kept: dict[str, int] = {}
    real = index_making.Making._join_parts

    def join_parts(making):
        kept.update({part.stem: part.stat().st_ino for part in build.glob("*.part")})
        real(making)

    monkeypatch.setattr(index_making.Making, "_join_parts", join_parts)
    records = JsonLines([stated(path)], Plain("jsonl", True), "text")
    assert spans(records) == reference(path.read_bytes())
    assert {name: kept[name] for name in done} == done
    resumed = index_of(tmp_path).read_bytes()
    index_of(tmp_path).unlink()
    JsonLines([stated(path)], Plain("jsonl", True), "text")
    assert index_of(tmp_path).read_bytes() == resumed
    assert not build.exists()


def test_a_process_that_is_stuck_keeps_nobody_waiting(tmp_path, small, monkeypatch):
    path = write(tmp_path)
    monkeypatch.setattr(index_making, "_STUCK_SECONDS", 0.05)
    making = index_making.Making
    real = making._locked

    def locked(self, lock, *, wait):
        return (
            index_making.contextlib.nullcontext(False)
            if lock.stem == "000003"
            else real(self, lock, wait=wait)
        )

    monkeypatch.setattr(making, "_locked", locked)
    assert spans(JsonLines([stated(path)], Plain("jsonl", True), "text")) == reference(path.read_bytes())


def test_a_file_system_without_locks_will_do(tmp_path, small, monkeypatch):
    def flock(*_):
        raise OSError(index_making.errno.ENOLCK, "no locks")

    path = write(tmp_path)
    monkeypatch.setattr(index_making.fcntl, "flock", flock)
    assert spans(JsonLines([stated(path)], Plain("jsonl", True), "text")) == reference(path.read_bytes())


# An index that does not fit


def rewritten(path: Path, content: bytes, *, same_time: bool = False) -> None:
    info = path.stat()
    path.write_bytes(content)
    if same_time:
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    else:
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 10**9))


@pytest.mark.parametrize("change", ["longer", "time", "content"])
def test_an_index_that_no_longer_fits_is_made_again(tmp_path, small, opened, capfd, change):
    path = write(tmp_path)
    before = opened(str(path)).fingerprint
    content = path.read_bytes()
    capfd.readouterr()
    if change == "longer":
        rewritten(path, content + b'{"text": "more"}\n')
        why = f"{path} is newer than the index, or of another size"
    elif change == "time":
        rewritten(path, content)  # as a copy of the corpus: the content decides
        why = f"{path} is newer than the index, or of another size"
    else:
        rewritten(path, content.replace(b"document", b"elements"), same_time=True)
        why = f"{path} is not what was indexed, though of the same size and time"
    after = opened(str(path))
    assert f"indexing again: {why}\n" in capfd.readouterr().err
    assert (after.fingerprint == before) == (change == "time")
    assert len(list((tmp_path / INDEX_FOLDER).iterdir())) == 1
    opened(str(path))
    assert "again" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", ["empty", "truncated", "header", "sums", "version", "other"])
def test_a_damaged_index_is_made_again(tmp_path, small, capfd, damage):
    path = write(tmp_path)
    JsonLines([stated(path)], Plain("jsonl", True), "text")
    index = index_of(tmp_path)
    whole = index.read_bytes()
    flipped = bytearray(whole)
    flipped[{"header": 30}.get(damage, -1)] ^= 1
    index.write_bytes(
        {
            "empty": b"",
            "truncated": whole[: len(whole) // 2],
            "version": whole.replace(b'"version": 1', b'"version": 9'),
            "other": b"x" * len(whole),
        }.get(damage, bytes(flipped))
    )
    assert spans(JsonLines([stated(path)], Plain("jsonl", True), "text")) == reference(path.read_bytes())
    assert f"its index {index} cannot be read, or is damaged" in capfd.readouterr().err
    assert index.read_bytes() == whole


def test_a_flipped_bit_is_found_where_it_is_used(tmp_path, small, monkeypatch):
    monkeypatch.setattr(index_module, "_SUM_BYTES", 256)
    path = write(tmp_path, 400)
    records = JsonLines([stated(path)], Plain("jsonl", True), "text")
    index = index_of(tmp_path)
    data = bytearray(index.read_bytes())
    data[4096 + 4 * 70] ^= 1  # the length of record 70
    index.write_bytes(data)
    records = JsonLines([stated(path)], Plain("jsonl", True), "text")
    assert records.text(10) == "document 10 " * 3
    with pytest.raises(DataError, match=r"index of the data, is damaged; remove it, and start again"):
        records.text(70)


def test_a_damaged_part_is_one_line(tmp_path, small, monkeypatch):
    path = write(tmp_path)
    monkeypatch.setattr(index_making, "write_part", lambda out, *_, **__: out.write(b"not a part"))
    with pytest.raises(DataError, match=r"\.part is damaged, and removed; run the command again"):
        JsonLines([stated(path)], Plain("jsonl", True), "text")


def test_a_file_that_changes_while_it_is_indexed(tmp_path, small):
    path = write(tmp_path)
    file = stated(path)
    rewritten(path, path.read_bytes() + b'{"text": "more"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl changed during the run; restore it"):
        JsonLines([file], Plain("jsonl", True), "text")
    assert not list((tmp_path / INDEX_FOLDER).glob("*.index"))


# Where it is kept


def unwritable(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Lets the folders refuse new entries, as those of others do (a test may run as root)."""
    real = Path.mkdir

    def mkdir(self, *args, **more):
        if any(folder in self.parents for folder in folders) and not self.exists():
            raise PermissionError(13, "Permission denied")
        real(self, *args, **more)

    monkeypatch.setattr(Path, "mkdir", mkdir)


def test_beside_files_that_cannot_be_written_it_is_in_the_cache(tmp_path, small, monkeypatch, data_cache):
    path = write(tmp_path / "data")
    unwritable(monkeypatch, tmp_path / "data")
    for _ in range(2):
        assert spans(JsonLines([stated(path)], Plain("jsonl", True), "text")) == reference(path.read_bytes())
    assert not (tmp_path / "data" / INDEX_FOLDER).exists()
    assert len(list(data_cache.glob("*.index"))) >= 1
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    unwritable(monkeypatch, tmp_path)
    with pytest.raises(
        DataError, match=r"cache/data cannot be written \(Permission denied\), and the data needs"
    ):
        JsonLines([stated(path)], Plain("jsonl", True), "text")


def test_a_disk_that_is_full_is_one_line_and_leaves_the_parts(tmp_path, small, monkeypatch):
    path = write(tmp_path)

    def fsync(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(
            DataError, match=r"cannot be written \(No space left on device\); free some space"
        ):
            JsonLines([stated(path)], Plain("jsonl", True), "text")
    assert not list(tmp_path.glob(f"{INDEX_FOLDER}/*/*.part"))
    assert spans(JsonLines([stated(path)], Plain("jsonl", True), "text")) == reference(path.read_bytes())


# Records and files of unusual size


def test_a_line_longer_than_memory_allows_is_cut_in_the_index(tmp_path, small, monkeypatch):
    monkeypatch.setattr(index_module, "_MAX_LENGTH", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + b"x" * 5000 + b'\n{"text": "b"}\n\n\n{"text": "c"}')
    records = JsonLines([stated(path)], Plain("jsonl", True), "text")
    assert [length for _, length in spans(records)] == [14, 100, 14, 13]
    assert [records.text(i) for i in (0, 2, 3)] == ["a", "b", "c"]


def test_an_index_costs_little_more_than_four_bytes_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(indexing, "SMALL_BYTES", 0)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "ab"}\n' * 200_000)
    records = JsonLines([stated(path)], Plain("jsonl", True), "text")
    assert index_of(tmp_path).stat().st_size < 4.3 * len(records) + 10_000
    touched = records._index._verified
    assert touched.sum() <= 1 and len(touched) > 10  # only the table of the files has been read
    assert records._span(123_456)[1:] == (123_456 * 15, 15)
    assert touched.sum() <= 4


@pytest.mark.parametrize("name", ["text", "jsonl", "gzip", "csv"])
def test_runs_of_earlier_versions_are_known_by_their_digests(opened, corpora, tokenizer, name):
    data = opened(corpora[name], validation_fraction=0.2)
    records = data._parts[0].source.records
    digest = hashlib.blake2b(digest_size=16)  # of all files, one after the other, as they computed it
    for path in sorted(Path(corpora[name]).parent.iterdir()):
        content = gzip.decompress(path.read_bytes()) if name == "gzip" else path.read_bytes()
        digest.update(content + len(content).to_bytes(8, "little"))
    names = [file.name for file in records.files]
    described = json.dumps([type(records).__name__, "text", names, records.counts.tolist()])
    fingerprint = hashlib.blake2b((described + digest.hexdigest()).encode(), digest_size=16).hexdigest()
    inputs = [Encoder(tokenizer).fingerprint, 0.2, True, [[fingerprint, 1.0]]]
    known = hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()
    assert data.is_of(known) and data.is_of(data.fingerprint)
    assert data.fingerprint != known and not data.is_of("2:" + known) and not data.is_of("")


def test_configurations_with_an_index_take_several_sources(tmp_path, opened, texts, monkeypatch):
    monkeypatch.setattr(indexing, "SMALL_BYTES", 0)
    files = []
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "a.txt").write_text(" ".join(texts[i * 30 : i * 30 + 30]))
        files.append(f"{folder}/*.txt")
    mixture = tuple(SourceConfig(name) for name in files)
    assert DataConfig(mixture=mixture).sources == mixture
    assert opened(mixture=mixture).records == len(source.open_records(SourceConfig(tuple(files))))
    assert np.all([list(tmp_path.glob(f"{i}/{INDEX_FOLDER}/*.index")) != [] for i in range(2)])
