"""Every reader on damaged files: arrays or a one-line error; never another exception, a crash or a hang."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.readers import TARGETS, seed_of, try_read, write_checkpoint

# Orbax leaves an unfinished task when a database is damaged.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CASES = sorted((Path(__file__).parent / "cases").glob("*-*"))
# Each attempt opens a database, or a folder for decompressed copies.
SLOW = tuple(name for name in TARGETS if name.startswith(("orbax", "data")))


@pytest.fixture
def valid(request, tmp_path):
    """A target's name, its checkpoint and the fuzzer's bytes in it."""
    path = write_checkpoint(request.param, tmp_path)
    return request.param, path, seed_of(request.param, path)


every_target = pytest.mark.parametrize("valid", TARGETS, indirect=True)


@every_target
def test_valid_files_are_read(valid):
    assert try_read(*valid)


@every_target
def test_truncated_files_are_read_or_refused(valid):
    name, path, data = valid
    # Every third size meets every byte of the fields, which have 4 or 8.
    head = range(0, min(len(data), 512), 3 if name not in SLOW else 23)
    tail = range(512, len(data), max(1, len(data) // 50))
    cuts = [*head, *tail] if name not in SLOW else [*head]
    read = [size for size in cuts if try_read(name, path, data[:size])]
    # Some formats ignore trailing data.
    assert len(read) <= len(cuts) // 2


@every_target
def test_files_with_flipped_bits_are_read_or_refused(valid):
    name, path, data = valid
    rng = random.Random(0)
    for _ in range(200 if name not in SLOW else 25):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            changed[rng.randrange(min(len(data), 4096))] ^= 1 << rng.randrange(8)
        try_read(name, path, bytes(changed))


@every_target
def test_files_with_extreme_integers_are_read_or_refused(valid):
    name, path, data = valid
    rng = random.Random(1)
    absurd = [(1 << bits) - back for bits in (31, 32, 40, 60, 63, 64) for back in (1, 2)]
    for _ in range(100 if name not in SLOW else 12):
        at, value = rng.randrange(min(len(data), 2048)), rng.choice(absurd)
        width = rng.choice((4, 8))
        changed = data[:at] + (value & ((1 << 8 * width) - 1)).to_bytes(width, "little") + data[at + width :]
        try_read(name, path, changed)
    for _ in range(50 if name not in SLOW else 6):  # digits of JSON
        digits = [at for at, byte in enumerate(data[:4096]) if chr(byte).isdigit()]
        if digits:
            at = rng.choice(digits)
            try_read(name, path, data[:at] + str(rng.choice(absurd)).encode() + data[at + 1 :])


@every_target
def test_other_files_are_refused(valid):
    name, path, _ = valid
    assert not try_read(name, path, b"")
    for other in (b"\0" * 100, b"GGUF", b"{}", b"PK\5\6" + bytes(18), b"\x80\x02.", b"null", b"[" * 5000):
        try_read(name, path, other)


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_regression_cases_of_the_fuzzer(case, tmp_path):
    name = next(name for name in TARGETS if case.name.startswith(f"{name}-"))
    try_read(name, write_checkpoint(name, tmp_path), case.read_bytes())
