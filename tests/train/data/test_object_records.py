"""The reader of ArrayRecord by ranges, against array_record's own writer."""

from __future__ import annotations

import random

import pytest
from array_record.python import array_record_module

from llama_jax.train.data.files import File
from llama_jax.train.data.object_records import ObjectRecords

OPTIONS = ("group_size:1", "", "group_size:16,uncompressed", "group_size:7,brotli:5", "group_size:3,snappy")


def opened(path):
    status = path.stat()
    return ObjectRecords(File(str(path), path.name, status.st_size, status.st_mtime_ns))


@pytest.mark.parametrize("options", OPTIONS)
def test_every_record_is_read(options, tmp_path):
    rng = random.Random(0)
    sizes = [rng.choice((0, 1, 10, 1000, 70_000, 200_000)) for _ in range(60)]  # over the blocks of 64 KiB
    records = [rng.randbytes(size) if size % 3 else b"abc" * size for size in sizes]
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a"), options)
    for record in records:
        writer.write(record)
    writer.close()
    found = opened(tmp_path / "a")
    assert found.num_records() == len(records)
    assert found.read(list(range(len(records)))) == records
    assert found.read([59, 0, 30]) == [records[59], records[0], records[30]]


def test_other_files_are_refused(tmp_path):
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "a"), "group_size:1,uncompressed")
    for _ in range(100):
        writer.write(b"record" * 1000)
    writer.close()
    whole = (tmp_path / "a").read_bytes()
    for name, content in {"text": b"no records" * 10_000, "cut": whole[:70_000], "short": b"x"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises((ValueError, IndexError)):
            opened(tmp_path / name)
