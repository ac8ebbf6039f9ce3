"""Format detection, and paths without a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_jax.errors import CheckpointError
from llama_jax.weights import open_source
from tests.weights.test_load import one_line
from tests.weights.writers import CONFIG, random_params, write_gguf, write_hf


def test_format_is_detected_from_contents(tmp_path: Path) -> None:
    params = random_params()
    assert open_source(str(write_hf(tmp_path / "x.gguf", CONFIG, params))).format == "hf"
    assert open_source(write_gguf(tmp_path / "x.bin", CONFIG, params)).format == "gguf"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("missing", None, "no such file"),
        ("empty", b"", "the file is empty"),
        ("text.txt", b"Once upon a time there was a llama" * 9, "unknown format"),
        ("model.safetensors", b"\x40\0\0\0\0\0\0\0" + b"{}" * 32, "give the directory"),
        ("consolidated.00.pth", b"PK\x03\x04" + bytes(99), "there is no params.json beside it"),
        ("pytorch_model.bin", b"\x80\x02" + bytes(99), "not a shard of a Meta checkpoint"),
        ("old.bin", b"tjgg" + bytes(99), "a GGML file older than GGUF"),
    ],
)
def test_unsupported_files_are_described(name: str, data: bytes | None, message: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_source(tmp_path / name)
    assert message in one_line(caught)
    assert str(tmp_path / name) in str(caught.value)


def test_directories_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="; give a GGUF file") as caught:
        open_source(tmp_path)
    one_line(caught)
    (tmp_path / "tokenizer.bin").touch()  # no model
    for name in ("a.gguf", "b.bin"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"several models \(a\.gguf, b\.bin\); give the path of one"):
        open_source(tmp_path)
    (tmp_path / "b.bin").unlink()
    with pytest.raises(CheckpointError, match=r"a\.gguf: the file is empty"):  # the only one
        open_source(tmp_path)


def test_pipes_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file") as caught:
        open_source(tmp_path / "pipe")
    one_line(caught)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"GGUF")
    (tmp_path / "secret").chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        open_source(tmp_path / "secret")
    one_line(caught)
