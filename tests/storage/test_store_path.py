"""`StorePath` against the emulators: what `pathlib.Path` promises, and what stores add."""

from __future__ import annotations

import contextlib
import os
import pickle
import re

import numpy as np
import pytest

from llama_jax.errors import StoreError
from llama_jax.storage import as_path, is_address, read_range, reading, writing


def test_the_parts_of_an_address():
    path = as_path("gs://bucket/a/b.c.txt")
    assert (path.scheme, path.bucket, path.key) == ("gs", "bucket", "a/b.c.txt")
    assert (path.name, path.suffix, path.stem, str(path.parent)) == (
        "b.c.txt",
        ".txt",
        "b.c",
        "gs://bucket/a",
    )
    assert str(path / "d") == "gs://bucket/a/b.c.txt/d" and os.fspath(path) == str(path)
    assert as_path(str(path)) == path == pickle.loads(pickle.dumps(path)) and as_path(path) is path
    assert str(path.relative_to(path.parent.parent)) == "a/b.c.txt"
    assert list(map(str, path.parents)) == ["gs://bucket/a", "gs://bucket"]
    assert path.parent.parent.parent == path.parent.parent and {path: 1}[as_path(str(path))] == 1
    assert path.is_absolute() and path.absolute() == path == path.expanduser()
    assert str((path / "../../../../x").absolute()) == "gs://bucket/x"
    assert not is_address("a/b") and not is_address("a:/b") and is_address("s3://x/y")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("gcs://bucket/a", "did you mean gs://bucket/a?"),
        ("s3a://bucket/a", "did you mean s3://bucket/a?"),
        ("GS://bucket/a", "did you mean gs://bucket/a?"),
        ("s4://bucket/a", "did you mean s3://bucket/a?"),
        (
            "https://host/a",
            "https:// is not supported, only gs:// (Google Cloud Storage) and s3:// (Amazon S3)",
        ),
        ("file:///home/a", "give the path alone: /home/a"),
        ("gs://", "names no bucket"),
        ("gs:///a", "names no bucket"),
        ("s3://a b/c", "no bucket's name"),
    ],
)
def test_what_is_no_address_is_one_line(address, words):
    with pytest.raises(StoreError) as caught:
        as_path(address)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_it_is_a_path(folder):
    path = folder / "a" / "x.bin"
    data = bytes(range(256)) * 400 + b"\r"
    assert not path.exists() and not folder.is_dir()
    path.write_bytes(data)
    (folder / "b.txt").write_text("line\nline\n")
    assert path.is_file() and not path.is_dir() and folder.is_dir() and not folder.is_file()
    assert path.stat().st_size == len(data) == path.info().size
    assert path.read_bytes() == data
    assert [p.name for p in folder.iterdir()] == ["a", "b.txt"]
    assert list(folder.find()) == [path, folder / "b.txt"]
    assert list(folder.glob("*")) == [folder / "a", folder / "b.txt"]
    assert (
        list(folder.glob("**/*.bin")) == list(folder.rglob("*.bin")) == list(folder.glob("a/x.*")) == [path]
    )
    with path.open("rb") as file:
        assert file.read(3) == data[:3]
        assert file.seek(-2, os.SEEK_END) == len(data) - 2 and file.read() == data[-2:]
        file.seek(300)
        assert file.read() == data[300:]
    with (folder / "b.txt").open() as text:
        assert text.readlines() == ["line\n", "line\n"]
    moved = (folder / "a").rename(folder / "c")
    assert list(moved.find()) == [moved / "x.bin"] and not path.exists()
    moved.remove_tree()
    assert not moved.exists()
    (folder / "b.txt").unlink()
    (folder / "b.txt").unlink(missing_ok=True)
    for gone in (path.stat, path.read_bytes, path.unlink, path.open):
        with pytest.raises(FileNotFoundError):
            gone()


def test_an_object_is_read_by_parts_and_ahead(folder, store, monkeypatch):
    monkeypatch.setattr(reading, "PART_BYTES", 1 << 16)
    monkeypatch.setattr(reading, "_FIRST_BYTES", 1 << 10)
    data = np.random.default_rng(0).bytes(1 << 20)
    path = folder / "x"
    path.write_bytes(data)
    store.faults.log.clear()
    assert read_range(path, 1000, 10).tobytes() == data[1000:1010]
    assert read_range(path, 5, 500_000).tobytes() == data[5:500_005]
    assert read_range(path, len(data) - 5, 100).tobytes() == data[-5:]
    reads = [line for line in store.faults.log if re.match(r"GET .*/x\?(alt=media|$)", line)]
    assert len(reads) == 1 + 8 + 1  # one of each part
    store.faults.log.clear()
    before = store.faults.bytes_sent
    with path.open("rb") as file:
        assert file.read(8) == data[:8]
        assert store.faults.bytes_sent - before < 10_000  # a header costs no more
        assert file.read() == data[8:]


def test_an_object_appears_when_its_write_ends(folder, monkeypatch):
    monkeypatch.setattr(writing, "PART_BYTES", 5 << 20)  # S3's least
    path = folder / "x"
    data = b"0123456789" * 1_200_000
    with path.open("wb") as file:
        for start in range(0, len(data), 1 << 20):
            file.write(data[start : start + (1 << 20)])
        assert not path.exists()
    assert path.read_bytes() == data
    with contextlib.suppress(RuntimeError), (folder / "y").open("wb") as file:
        file.write(data)
        raise RuntimeError
    assert not (folder / "y").exists()


def test_one_creates_and_only_its_version_is_replaced(folder):
    path = folder / "lock"
    version = writing.create(path, b"first")
    assert version and writing.create(path, b"second") is None
    newer = writing.replace(path, b"third", version)
    assert newer and writing.replace(path, b"fourth", version) is None
    assert path.read_bytes() == b"third" and path.info().version == newer
