"""Compressed files give what the decompressed ones of the same name do; damaged and hostile ones an error."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from llama_jax.errors import DataError
from llama_jax.train.data import DataConfig, SourceConfig, train_texts
from llama_jax.train.data import cache as cache_module
from llama_jax.train.data.source import open_records
from tests.train.data.test_batches import assert_same, take


def by_arrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        out = pa.BufferOutputStream()
        with pa.CompressedOutputStream(out, codec) as stream:
            stream.write(data)
        return out.getvalue().to_pybytes()

    return compress


COMPRESS = {
    "gz": gzip.compress,
    "zst": by_arrow("zstd"),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lz4": by_arrow("lz4"),
}


def read(files: str | tuple[str, ...], **settings: object) -> list[str]:
    records = open_records(SourceConfig(files, **settings))
    return [records.text(i) for i in range(len(records))]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "txt"])
def test_a_compressed_file_is_read_like_the_decompressed_one(tmp_path, opened, texts, suffix, kind):
    array = json.dumps([{"text": text} for text in texts]).encode()
    content = {"jsonl": jsonl(texts), "json": array, "txt": "\n".join(texts).encode()}[kind]
    for folder, name, data in (
        ("plain", f"a.{kind}", content),
        ("suffix", f"a.{kind}.{suffix}", COMPRESS[suffix](content)),
        ("magic", f"a.{kind}", COMPRESS[suffix](content)),  # by its content alone
        ("parts", f"a.{kind}.{suffix}", b"".join(map(COMPRESS[suffix], (content[:777], content[777:])))),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(data)
    folders = ("plain", "suffix", "magic", "parts")
    plain, *others = (opened(f"{tmp_path}/{name}/*", seq_len=32) for name in folders)
    expected = take(plain.train(), 3)
    for other in others:
        assert other.fingerprint == plain.fingerprint
        assert_same(take(other.train(), 3), expected)
    batches = plain.train()
    next(batches)
    resumed = others[0].train()  # a run can go on with the other form
    resumed.restore([batches.state()])
    assert_same(take(resumed, 2), expected[1:])


def test_a_skippable_frame_before_zstd_as_pzstd_writes(tmp_path, texts):
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + COMPRESS["zst"](jsonl(texts)))
    assert read(f"{tmp_path}/a.jsonl.zst") == texts


def test_padding_after_gzip_is_ignored(tmp_path, texts):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)) + b"\0" * 512)
    assert read(f"{tmp_path}/a.jsonl.gz") == texts


# Frames of zstd and lz4 have a checksum if their command lines wrote them; Arrow writes none.
DAMAGES = [(suffix, damage) for suffix in COMPRESS for damage in ("cut", "flipped", "other", "empty")]
DAMAGES = [case for case in DAMAGES if case not in (("zst", "flipped"), ("lz4", "flipped"))]


@pytest.mark.parametrize(("suffix", "damage"), DAMAGES)
def test_a_damaged_file(tmp_path, data_cache, suffix, damage):
    data = bytearray(COMPRESS[suffix](os.urandom(5000)))
    if damage == "flipped":
        data[2000] ^= 0x55
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes({"cut": data[:-900], "flipped": data, "other": b"{}\n", "empty": b""}[damage])
    before = set(data_cache.glob("*"))
    with pytest.raises(DataError) as raised:
        read(str(path))
    message = str(raised.value)
    assert "\n" not in message and message.startswith(f"{path} ") and "copy it again" in message
    assert set(data_cache.glob("*")) <= before | {data_cache / "lock"}
    if damage == "other":  # the way out
        path.rename(tmp_path / "a.jsonl")
        assert len(open_records(SourceConfig(f"{tmp_path}/a.jsonl"))) == 1


def test_a_bad_line_is_named_by_its_number_in_the_decompressed_file(tmp_path, opened, texts):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(texts[:7]) + b"{\n" + jsonl(texts)))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:8: not JSON"):
        list(train_texts(DataConfig(f"{tmp_path}/a.jsonl.gz", validation_fraction=0)))


def test_a_file_compressed_and_not(tmp_path, texts):
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    with pytest.raises(
        DataError, match=r"compressed and not; narrow it, or leave one out with data\.exclude"
    ) as error:
        read(f"{tmp_path}/*")
    exclude = str(error.value).partition('["')[2].partition('"]')[0]
    assert read(f"{tmp_path}/*", exclude=[exclude]) == texts


def test_a_changed_file_is_decompressed_again_and_noticed_during_a_run(tmp_path, opened, texts):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(texts)))
    batches = opened(str(path), validation_fraction=0).train()
    path.write_bytes(gzip.compress(jsonl(texts[::-1])))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz changed during the run"):
        take(batches, 20)
    assert read(str(path)) == texts[::-1]


# The cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache_module, "_claimed", {})
    return tmp_path / "cache" / "data"


def end_process() -> None:
    """What the end of this process does to the cache."""
    for descriptor, _ in cache_module._claimed.values():
        os.close(descriptor)
    cache_module._claimed.clear()


def copies(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.copy"))


def test_a_file_is_decompressed_once(tmp_path, cache, texts, monkeypatch):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(texts)))
    read(str(path))
    (copy,) = copies(cache)
    monkeypatch.setattr(cache_module, "_write", lambda *_: pytest.fail("written again"))
    assert read(str(path)) == texts
    assert copies(cache) == [copy]


def test_a_bomb_is_not_unpacked(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(cache_module, "_ALWAYS_BYTES", 1 << 20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\n" * (20 << 20)))
    with pytest.raises(
        DataError, match=r"a\.txt\.gz has \d+ bytes and expands to more than \d+; .* decompress it"
    ):
        read(f"{tmp_path}/a.txt.gz")
    assert not copies(cache) and not list(cache.glob("*.part"))


def test_the_disk_is_not_filled(tmp_path, cache, texts, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(jsonl([*texts, name])))
    read(f"{tmp_path}/a.jsonl.gz")
    monkeypatch.setattr(cache_module, "_reserve", lambda total: total)
    message = r"b\.jsonl\.gz is converted into \S+, whose disk is nearly full; .*set LLAMA_JAX_CACHE"
    with pytest.raises(DataError, match=message):
        read(f"{tmp_path}/b.jsonl.gz")
    assert len(copies(cache)) == 1  # in use
    end_process()
    with pytest.raises(DataError, match=message):
        read(f"{tmp_path}/b.jsonl.gz")
    assert not copies(cache)


def test_copies_that_nobody_used_for_a_month_are_removed(tmp_path, cache, texts):
    for name in "abc":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(jsonl([*texts, name])))
    read(f"{tmp_path}/a.jsonl.gz")
    (old,) = copies(cache)
    long_ago = time.time() - 40 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    (cache / "x.7.part").write_bytes(b"of a process that was killed")
    read(f"{tmp_path}/b.jsonl.gz")
    assert old in copies(cache)  # in use by this process
    end_process()
    os.utime(old, (long_ago, long_ago))
    read(f"{tmp_path}/c.jsonl.gz")
    assert len(copies(cache)) == 2 and old not in copies(cache) and not list(cache.glob("*.part"))
    assert len(list(cache.glob("*.user"))) == 1  # the list of the process that ended is gone


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_many_files_take_one_descriptor(tmp_path, cache, texts):
    for i in range(40):
        (tmp_path / f"{i:02}.jsonl.gz").write_bytes(gzip.compress(jsonl([str(i)])))
    read(f"{tmp_path}/00.jsonl.gz")
    before = open_files()
    assert len(read(f"{tmp_path}/*.jsonl.gz")) == 40
    assert open_files() <= before + 2
    assert len(copies(cache)) == 40


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, texts):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        DataError, match=r"a copy of \S+a\.jsonl\.gz .*set LLAMA_JAX_CACHE to a writable"
    ) as raised:
        read(f"{tmp_path}/a.jsonl.gz")
    assert "\n" not in str(raised.value)
