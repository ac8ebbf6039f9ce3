"""llama2.c files: the three versions, and inconsistent sizes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from llama_jax.errors import CheckpointError
from llama_jax.weights import load_params, open_source
from tests.weights.test_load import LLAMA2C, assert_same, one_line
from tests.weights.writers import random_params, write_llama2c


@pytest.mark.parametrize("group", [64, 16])
def test_int8_group_sizes(group: int, tmp_path: Path) -> None:
    params = random_params(LLAMA2C)
    source = open_source(write_llama2c(tmp_path / "a.bin", LLAMA2C, params, version=2, group=group))
    assert source.tensors["wq[0]"].dtype == "INT8"
    assert source.tensors["rms_att_weight[0]"].dtype == "F32"
    assert_same(load_params(source), params)


def test_file_name_is_ignored(tmp_path: Path) -> None:
    source = open_source(write_llama2c(tmp_path / "model", LLAMA2C, random_params(LLAMA2C)))
    assert (source.format, source.detected_by) == ("llama2c", "the file begins with a llama2.c header")


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize("change", [-1, 1, -5000])
def test_wrong_file_sizes_are_refused(version: int, change: int, tmp_path: Path) -> None:
    path = write_llama2c(tmp_path / "a.bin", LLAMA2C, random_params(LLAMA2C), version=version)
    whole = path.read_bytes()
    path.write_bytes((whole + b"\0")[: len(whole) + change])
    with pytest.raises(CheckpointError) as caught:
        open_source(path)
    assert f"has {len(whole) + change} bytes but its header requires {len(whole)}" in one_line(caught)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_truncated_headers_raise_one_line_errors(version: int, tmp_path: Path) -> None:
    path = write_llama2c(tmp_path / "a.bin", LLAMA2C, random_params(LLAMA2C), version=version)
    whole = path.read_bytes()
    for length in range(257):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            open_source(path)
        one_line(caught)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, 160, 3, 6, 4, 96, 128), "not a multiple of num_attention_heads 6"),
        ((64, 160, 3, 8, 3, 96, 128), "not a multiple of num_key_value_heads 3"),
        ((64, 160, 0, 8, 4, 96, 128), "unknown format"),
        ((64, -160, 3, 8, 4, 96, 128), "unknown format"),
        ((1 << 23, *(1 << 22,) * 6), "but its header requires"),
    ],
)
def test_invalid_sizes_are_refused(sizes: tuple[int, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(struct.pack("<7i", *sizes) + bytes(1000))
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / "a.bin")
    assert message in one_line(caught)


def test_extreme_sizes_after_the_magic_number(tmp_path: Path) -> None:
    header = b"24ka" + struct.pack("<8i", 1, 2, 1, (1 << 31) - 1, 1, 1, 1, 1)
    (tmp_path / "a.bin").write_bytes(header.ljust(256, b"\0"))
    with pytest.raises(CheckpointError, match=r"has 256 bytes but its header requires") as caught:
        open_source(tmp_path / "a.bin")
    one_line(caught)
    (tmp_path / "a.bin").write_bytes((b"24ka" + struct.pack("<8i", 1, 0, *[1] * 6)).ljust(256, b"\0"))
    with pytest.raises(CheckpointError, match="or a damaged one: hidden_size is 0"):
        open_source(tmp_path / "a.bin")


def test_unknown_version_and_group(tmp_path: Path) -> None:
    path = write_llama2c(tmp_path / "a.bin", LLAMA2C, random_params(LLAMA2C), version=2)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + struct.pack("<i", 3) + whole[8:])
    with pytest.raises(CheckpointError, match=r"version 3 is not supported; only 0, 1 and 2"):
        open_source(path)
    for group in (0, 48):
        path.write_bytes(whole[:37] + struct.pack("<i", group) + whole[41:])
        with pytest.raises(CheckpointError, match=f"group size {group} does not divide hidden_size 64"):
            open_source(path)


def test_invalid_scales_are_refused(tmp_path: Path) -> None:
    # As in files of an early export.py, with other tensors' int8 values in place of the scales.
    path = write_llama2c(tmp_path / "a.bin", LLAMA2C, random_params(LLAMA2C), version=2)
    source = open_source(path)
    info = source.tensors["wk[1]"]
    raw = bytearray(path.read_bytes())
    offset = info.offset + np.prod(info.shape)
    raw[offset : offset + 8] = struct.pack("<2f", 1.0, -1.0)
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"'wk\[1\]' has negative or non-finite scales") as caught:
        load_params(open_source(path))
    one_line(caught)
