"""torch checkpoints without torch: views of storages are read, hostile files are refused."""

from __future__ import annotations

import io
import os
import re
import shutil
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.errors import CheckpointError
from llama_jax.weights import torch_zip
from llama_jax.weights.torch_zip import read_array, read_torch_zip
from tests.golden import meta
from tests.weights.test_load import one_line, problem

GOLDEN = meta.folder(2) / "consolidated.00.pth"
V2 = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def row(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    *,
    offset: bytes = b"K\0",
    length: bytes = b"K\6",
    kind: bytes = b"FloatStorage",
    key: bytes = b"X\1\0\0\x000",
    hooks: bytes = b"}",
    after: bytes = b"",
) -> bytes:
    """A tensor as torch pickles it; the arguments can make it invalid."""
    storage = b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + key + text("cpu") + length + b"tQ"
    return V2 + b"(" + storage + offset + row(*shape) + row(*strides) + b"\x89" + hooks + after + b"tR"


def pickled(*values: bytes, end: bytes = b"") -> bytes:
    """The pickle of a dict of these values, named a, b, ..."""
    items = b"".join(text(chr(97 + index)) + value for index, value in enumerate(values))
    return b"\x80\x02}(" + items + b"u" + end + b"."


STORAGE = np.arange(6, dtype="<f4").tobytes()


def archive(path: Path, data: bytes, entries: Mapping[str, bytes] | None = None, **options: Any) -> Path:
    """A torch file with this pickle, written by Python's zipfile."""
    contents = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (contents | (entries or {"data/0": STORAGE})).items():
            file.writestr(f"archive/{name}", content, **options)
    return path


def message(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_torch_zip(path)
    assert str(path) in str(caught.value)
    return one_line(caught)


def test_tensors(tmp_path: Path) -> None:
    transposed = tensor((3, 2), (1, 3))
    column = tensor((2, 1), (3, 0), offset=b"K\2")
    tensors = read_torch_zip(archive(tmp_path / "a.pth", pickled(tensor(), transposed, column)))
    assert [(info.shape, info.dtype, info.nbytes) for info in tensors.values()] == [
        ((2, 3), "F32", 24),
        ((3, 2), "F32", 24),
        ((2, 1), "F32", 8),
    ]
    a, b, c = (read_array(name, info) for name, info in tensors.items())
    assert a.tolist() == [[0, 1, 2], [3, 4, 5]] and b.tolist() == a.T.tolist() and c.tolist() == [[2], [5]]
    assert b.flags.c_contiguous


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
def test_views_are_read_like_numpy(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_zip, "_BLOCK", block)
    rng = np.random.default_rng(0)
    for case in range(20):
        whole = rng.standard_normal(rng.integers(1, 9, rng.integers(1, 5)).tolist()).astype("<f2")
        cuts = [slice(*sorted(rng.integers(0, size + 1, 2)), rng.integers(1, 4)) for size in whole.shape]
        view = whole[tuple(cuts)].transpose(rng.permutation(whole.ndim))
        strides = [stride // 2 for stride in view.strides]
        offset = (view.__array_interface__["data"][0] - whole.__array_interface__["data"][0]) // 2
        described = tensor(
            view.shape,
            tuple(strides),
            offset=number(offset if view.size else 0),
            length=number(whole.size),
            kind=b"HalfStorage",
        )
        path = archive(tmp_path / f"{case}.pth", pickled(described), {"data/0": whole.tobytes()})
        (info,) = read_torch_zip(path).values()
        np.testing.assert_array_equal(read_array("a", info), view, strict=True)


def test_non_contiguous_tensors_are_read_in_bounded_memory(tmp_path: Path) -> None:
    rows, width = 16, 1 << 20
    whole = np.arange(rows * width, dtype="<f4")
    described = tensor((rows, 3), (width, 1), offset=number(5), length=number(whole.size))
    path = archive(tmp_path / "a.pth", pickled(described), {"data/0": whole.tobytes()})
    (info,) = read_torch_zip(path).values()
    tracemalloc.start()
    array = read_array("a", info)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(array, whole.reshape(rows, width)[:, 5:8])
    assert peak < 4 * torch_zip._BLOCK + 100_000 < whole.nbytes / 2


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_nested_state_dicts(key: str, tmp_path: Path) -> None:
    inner = b"}(" + text("w") + tensor() + b"u"
    rest = (
        text("step") + b"K\3" + text("rate") + b"G?\xb9\x99\x99\x99\x99\x99\x9a" + text("log") + b"](K\1K\2e"
    )
    outer = b"\x80\x02}(" + text(key) + inner + rest + b"u."
    assert list(read_torch_zip(archive(tmp_path / "a.pth", outer))) == ["w"]


# Tensors that exceed their storages.


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (tensor(key=text("1")), "storage '1' of 6 F32, which is missing"),
        (tensor(key=text("../data.pkl")), "which is missing"),
        (tensor(length=b"K\7"), "storage '0' of 7 F32, which has 24 bytes"),
        (tensor(kind=b"DoubleStorage"), "of 6 F64, which has 24 bytes"),
        (tensor(offset=b"K\1"), r"shape \[2, 3\] and strides \[3, 1\] at element 1 of 6"),
        (tensor(strides=(4, 1)), "at element 0 of 6"),
        (tensor((1 << 61, 1 << 61), (0, 0)), "expanded"),
        (tensor((2, 3), (0, 1)), "expanded"),
        (tensor((2, 3), (1, 1)), "at element 0 of 6"),
        (tensor((1 << 40, 3), (1 << 40, 1)), "at element 0 of 6"),
        (tensor((0, 3), (3, 1), offset=b"K\7"), "at element 7 of 6"),
        (b"K\3", "not a tensor: 'a'"),
        (b"}", "not a tensor: 'a'"),
    ],
)
def test_tensors_outside_their_storage_are_refused(described: bytes, expected: str, tmp_path: Path) -> None:
    assert re.search(expected, message(archive(tmp_path / "a.pth", pickled(described))))


def test_many_views_of_one_storage_are_refused(tmp_path: Path) -> None:
    many = b"".join(text(f"t{index}") + tensor() for index in range(5_000))
    path = archive(tmp_path / "a.pth", b"\x80\x02}(" + many + b"u.")
    read_torch_zip(path)  # the pickle is larger than their extent
    storage = bytes(4_000_000)
    view = tensor((1000, 1000), (1000, 1), length=number(1_000_000))
    many = b"".join(text(f"t{index}") + view for index in range(100))
    path = archive(tmp_path / "b.pth", b"\x80\x02}(" + many + b"u.", {"data/0": storage})
    assert "span 400000000 bytes in a file of 40" in message(path)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"\x80\x02}.", "holds a dict without named tensors"),
        (b"\x80\x02].", "holds a list"),
        (pickled(tensor())[:-1] + b"0N.", "has the opcode b'0'"),
        (b"\x80\x02N.", "holds a NoneType"),
    ],
)
def test_pickles_without_tensors(data: bytes, expected: str, tmp_path: Path) -> None:
    assert expected in message(archive(tmp_path / "a.pth", data))


# Archives.


def test_files_not_written_by_torch(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for data, expected in [
        (b"", "not a torch.save file"),
        (b"PK\x03\x04", "truncated"),
        (b"hello" * 100, "not a torch.save file"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "older than version 1.6; load it in PyTorch"),
    ]:
        path.write_bytes(data)
        assert expected in message(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/b", "c")
    assert "torch.save did not write" in message(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", "c")
        file.writestr("b/data.pkl", "c")
    assert "torch.save did not write" in message(path)


def test_unsupported_zip_entries_are_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "a.pth", pickled(tensor())
    archive(path, good, {"data/0": STORAGE, "constants.pkl": b"\x80\x02)."})
    assert "TorchScript" in message(path)
    archive(path, good, {"data/0": STORAGE, "byteorder": b"big"})
    assert "its byte order is 'big'" in message(path)
    archive(path, good, compress_type=zipfile.ZIP_DEFLATED)
    assert "'archive/data.pkl' is compressed or encrypted" in message(path)
    for name in ("../evil", "a/../../evil", "./a", "a//b", "a\\..\\b", "C:a", "a\nb"):
        archive(path, good, {"data/0": STORAGE, name: b""})
        assert "path outside the archive" in message(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("/archive/data.pkl", good)
    assert "path outside the archive" in message(path)
    link = zipfile.ZipInfo("archive/data/0")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", good)
        file.writestr(link, "/etc/passwd")
    assert "'archive/data/0' is a link" in message(path)
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            file.writestr("archive/data.pkl", good)
    assert "'archive/data.pkl' appears twice" in message(path)


def test_entries_that_share_data(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", pickled(tensor()), {"data/0": STORAGE, "data/1": STORAGE})
    data = bytearray(path.read_bytes())
    places = [found.start() for found in re.finditer(b"PK\x01\x02", data)]
    first = struct.unpack_from("<L", data, places[3] + 42)[0]
    # Both directory entries now point to one local header, which has the first entry's name.
    struct.pack_into("<L", data, places[4] + 42, first)
    path.write_bytes(data)
    assert "does not match the directory" in message(path)
    inner = data.find(b"archive/data/0")
    data[inner : inner + 14] = data[places[4] + 46 : places[4] + 60] = b"archive/data/0"
    path.write_bytes(data)
    assert "appears twice" in message(path)


def test_overlapping_entries(tmp_path: Path) -> None:
    # An entry, including its header, inside the data of another.
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("archive/data/0", STORAGE)
    whole = inner.getvalue()
    header = whole[: whole.find(b"PK\x01\x02")]
    path = archive(tmp_path / "a.pth", pickled(tensor()), {"data/0": STORAGE, "data/1": header})
    data = bytearray(path.read_bytes())
    places = [found.start() for found in re.finditer(b"PK\x01\x02", data)]
    struct.pack_into("<L", data, places[3] + 42, data.find(header, data.find(b"archive/data/1")))
    path.write_bytes(data)
    assert re.search("'archive/data/1' and 'archive/data/0' overlap", message(path))


HUGE = {"2^32 - 2": 0xFFFFFFFE, "2^32 - 1": 0xFFFFFFFF, "0": 0, "1": 1, "the file's end": None}


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize(("magic", "field", "width"), [
    *((b"PK\x01\x02", at, 4) for at in (0, 16, 20, 24, 38, 42)),
    *((b"PK\x01\x02", at, 2) for at in (8, 10, 28, 30, 32, 34)),
    *((b"PK\x03\x04", at, 4) for at in (0, 18, 22)),
    *((b"PK\x03\x04", at, 2) for at in (6, 8, 26, 28)),
    *((b"PK\x05\x06", at, 4) for at in (0, 12, 16)),
    *((b"PK\x05\x06", at, 2) for at in (4, 6, 10, 20)),
])  # fmt: skip
def test_extreme_integers_in_headers(
    magic: bytes, field: int, width: int, value: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.pth"
    good = GOLDEN.read_bytes()
    expected = contents(GOLDEN)
    for found in list(re.finditer(re.escape(magic), good))[:3]:
        data = bytearray(good)
        absurd = len(good) if HUGE[value] is None else HUGE[value]
        data[found.start() + field :][:width] = b""
        place = slice(found.start() + field, found.start() + field + width)
        data[place] = (absurd & (1 << 8 * width) - 1).to_bytes(width, "little")
        path.write_bytes(data)
        if not problem(lambda: read_torch_zip(path)):
            assert_same_shapes(contents(path), expected)


def contents(path: Path) -> dict[str, np.ndarray]:
    return {name: read_array(name, info) for name, info in read_torch_zip(path).items()}


def assert_same_shapes(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert {name: array.shape for name, array in found.items()} == {
        name: array.shape for name, array in expected.items()
    }


def test_inconsistent_zip64_directories(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", pickled(tensor()))
    good = path.read_bytes()
    end, begin = good.rfind(b"PK\x05\x06"), good.find(b"PK\x01\x02")
    count = good.count(b"PK\x01\x02")

    def with_end64(**overrides: int) -> str:
        values = {"count": count, "length": end - begin, "begin": begin, "place": end} | overrides
        end64 = struct.pack(
            "<4sQ2H2L4Q",
            b"PK\x06\x06",
            44,
            45,
            45,
            0,
            0,
            count,
            values["count"],
            values["length"],
            values["begin"],
        )
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, values["place"], 1)
        path.write_bytes(good[:end] + end64 + locator + good[end:])
        return problem(lambda: read_torch_zip(path))

    assert with_end64() == ""
    assert "not 9223372036854775807" in with_end64(count=(1 << 63) - 1)
    for name in ("length", "begin", "place"):
        for value in (0, 1, end + 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
            error = with_end64(**{name: value})
            assert error and "\n" not in error
    path.write_bytes(good[:end] + struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1) + good[end:])
    assert "the end of its directory is malformed" in message(path)


def test_huge_directories_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    size = 1 << 33  # a sparse file
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size - 8, 8)
        locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, size, 1)
        file.seek(size)
        file.write(end64 + locator + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 0xFFFFFFFF, 8, 0))
    tracemalloc.start()
    error = message(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "its directory has 8589934584 bytes" in error
    assert peak < 1_000_000


def test_huge_pickles_are_not_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", bytes((64 << 20) + 1))
    assert "an entry has 67108865 bytes; at most 67108864 are read" in message(path)


def test_truncations_and_gaps(tmp_path: Path) -> None:
    path, good = tmp_path / "a.pth", GOLDEN.read_bytes()
    boundaries = {0, len(good)}
    for magic, size in ((b"PK\x03\x04", 30), (b"PK\x01\x02", 46), (b"PK\x05\x06", 22), (b"PK\x07\x08", 16)):
        for found in re.finditer(re.escape(magic), good):
            boundaries |= {found.start(), found.start() + 4, found.start() + size}
    for cut in sorted(boundaries):
        for data in (
            good[: cut - 1],
            good[:cut],
            good[: cut + 1],
            good[cut + 1 :],
            good[:cut] + good[cut + 9 :],
        ):
            if data != good:
                path.write_bytes(data)
                message(path)


def test_damaged_headers(tmp_path: Path) -> None:
    """Every byte of the headers and the directory, changed: an error, or tensors of equal shapes."""
    path = Path(shutil.copy(GOLDEN, tmp_path / "a.pth"))
    good, expected = path.read_bytes(), contents(path)
    with zipfile.ZipFile(path) as file:
        inside = {
            at for entry in file.infolist() for at in range(entry.header_offset + 60, data_end(entry, good))
        }
    rng = np.random.default_rng(0)
    refused = 0
    places = [at for at in range(len(good)) if at not in inside]
    with path.open("r+b", buffering=0) as file:
        for at in places:
            os.pwrite(file.fileno(), bytes([good[at] ^ 1 << int(rng.integers(8))]), at)
            if error := problem(lambda: contents(path)):
                assert "\n" not in error and len(error) < 400
                refused += 1
            else:
                assert_same_shapes(contents(path), expected)
            os.pwrite(file.fileno(), good[at : at + 1], at)
    assert len(places) > refused > len(places) / 2


def test_a_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    path = Path(shutil.copy(GOLDEN, tmp_path / "a.pth"))
    with zipfile.ZipFile(path) as file:
        first = next(entry for entry in file.infolist() if "/data/" in entry.filename)
    data = bytearray(path.read_bytes())
    data[data_end(first, data) - 1] ^= 1
    path.write_bytes(data)
    assert "the checksum of tensor '" in problem(lambda: contents(path))


def test_an_archive_without_checksums(tmp_path: Path) -> None:
    """As `torch.serialization.set_crc32_options(False)` writes it: every CRC-32 is 0."""
    path = Path(shutil.copy(GOLDEN, tmp_path / "a.pth"))
    data = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        for entry in file.infolist():
            data = data.replace(
                struct.pack("<I", entry.CRC) + struct.pack("<I", entry.file_size),
                bytes(4) + struct.pack("<I", entry.file_size),
            )
    path.write_bytes(data)
    assert all(info.CRC == 0 for info in zipfile.ZipFile(path).infolist())
    for name, info in read_torch_zip(GOLDEN).items():
        np.testing.assert_array_equal(read_array(name, read_torch_zip(path)[name]), read_array(name, info))


def data_end(entry: zipfile.ZipInfo, data: bytes) -> int:
    """Returns the end offset of an entry's data."""
    lengths = struct.unpack_from("<2H", data, entry.header_offset + 26)
    return entry.header_offset + 30 + sum(lengths) + entry.file_size
