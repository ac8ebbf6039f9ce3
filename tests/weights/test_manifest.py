"""A manifest tells of every change to the files that it lists, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_jax.errors import CheckpointError
from llama_jax.weights import manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tree with a part that was hashed by itself, as another process's share is."""
    root = tmp_path / "step"
    for name, data in {"a": b"alpha", "b/c": b"", "b/share/d": bytes(70_000), "b/share/e/f": b"x"}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    manifest.write_manifest(root / "b" / "share")
    manifest.write_manifest(root)
    return root


def problem(folder: Path, **how: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        manifest.verify(folder, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_unchanged_is_believed(folder: Path) -> None:
    manifest.verify(folder)
    manifest.verify(folder / "b" / "share")
    (folder / "empty").mkdir()
    manifest.verify(folder)
    assert len(manifest.read_manifest(folder)) == 5


def test_a_flipped_bit_in_any_byte_of_any_file_is_found_and_named(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        for place in range(0, len(data), max(1, len(data) // 50)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert str(path) in problem(folder)
        path.write_bytes(data)
    manifest.verify(folder)


def test_files_that_are_missing_new_or_of_another_size_are_named(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file() and path != folder / manifest.NAME]:
        data = path.read_bytes()
        path.write_bytes(data + b"0")
        assert str(path) in problem(folder, quick=True)
        path.unlink()
        message = problem(folder, quick=True)
        # Without its manifest a share is no longer one: what is in it is new to the whole.
        assert str(path) in message or path.name == manifest.NAME
        path.write_bytes(data)
    (folder / "b" / "share" / "new").touch()
    assert str(folder / "b" / "share" / "new") in problem(folder, quick=True)


def test_a_quick_look_reads_small_files_alone(folder: Path) -> None:
    (folder / "b" / "share" / "d").write_bytes(b"1" * 70_000)
    manifest.verify(folder, quick=True)
    (folder / "a").write_bytes(b"aleph")
    assert str(folder / "a") in problem(folder, quick=True)


def test_shares_together_read_everything(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file() and path.name != manifest.NAME]:
        data = path.read_bytes()
        if data:
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
            found = 0
            for index in range(3):
                try:
                    manifest.verify(folder, share=(index, 3))
                except CheckpointError:
                    found += 1
            assert found == 1
            path.write_bytes(data)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b'{"files": 3}',
        b'{"files": {"../secret": [1, "00"]}}',
        b'{"files": {"/etc/passwd": [1, "00"]}}',
        b'{"files": {"a": [-1]}}',
        b'{"files": {"a": ["1", 2]}}',
        b"[" * 100_000,
        json.dumps({"files": {"a": [5, "0" * 64]}}).encode(),
    ],
)
def test_a_manifest_that_no_one_wrote(text: bytes, folder: Path) -> None:
    (folder / manifest.NAME).write_bytes(text)
    assert str(folder / manifest.NAME) in problem(folder)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    assert "there is no checksums.json" in problem(tmp_path)
