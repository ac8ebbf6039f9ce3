"""A manifest detects every change to the files that it lists, and reports no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama_jax.errors import CheckpointError
from llama_jax.weights import manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with a subdirectory that has its own manifest, as another process writes it."""
    root = tmp_path / "step"
    for name, data in {"a": b"alpha", "b/c": b"", "b/shard/d": bytes(140_000), "b/shard/e/f": b"x"}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    manifest.write_manifest(root / "b" / "shard")
    manifest.write_manifest(root)
    return root


def problem(folder: Path, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        manifest.verify(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unchanged_files_are_verified(folder: Path) -> None:
    manifest.verify(folder)
    manifest.verify(folder / "b" / "shard")
    (folder / "empty").mkdir()
    manifest.verify(folder)
    assert len(manifest.read_manifest(folder)) == 5


def test_flipped_bits_in_any_file_are_detected(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        for place in range(0, len(data), max(1, len(data) // 50)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert str(path) in problem(folder)
        path.write_bytes(data)
    manifest.verify(folder)


def test_missing_new_and_resized_files_are_named(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file() and path != folder / manifest.NAME]:
        data = path.read_bytes()
        path.write_bytes(data + b"0")
        assert str(path) in problem(folder, quick=True)
        path.unlink()
        message = problem(folder, quick=True)
        # Without its manifest, the subdirectory's files count as unexpected files of the parent.
        assert str(path) in message or path.name == manifest.NAME
        path.write_bytes(data)
    (folder / "b" / "shard" / "new").touch()
    assert str(folder / "b" / "shard" / "new") in problem(folder, quick=True)


def test_quick_hashes_only_small_files(folder: Path) -> None:
    (folder / "b" / "shard" / "d").write_bytes(b"1" * 140_000)
    manifest.verify(folder, quick=True)
    (folder / "a").write_bytes(b"aleph")
    assert str(folder / "a") in problem(folder, quick=True)


def test_shards_together_hash_every_file_once(folder: Path) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file() and path.name != manifest.NAME]:
        data = path.read_bytes()
        if data:
            path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
            found = 0
            for index in range(3):
                try:
                    manifest.verify(folder, shard=(index, 3))
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
def test_invalid_manifests_are_refused(text: bytes, folder: Path) -> None:
    (folder / manifest.NAME).write_bytes(text)
    assert str(folder / manifest.NAME) in problem(folder)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    assert "there is no checksums.json" in problem(tmp_path)


def test_large_files_of_arrays_with_digests_are_listed_by_size(folder: Path) -> None:
    large = folder / "b" / "shard" / "d"
    manifest.write_manifest(folder / "b" / "shard", arrays_have_digests=True)
    manifest.write_manifest(folder)
    assert [entry.path for entry in manifest.read_manifest(folder) if entry.sha256 is None] == [large]
    large.write_bytes(b"1" * 140_000)
    manifest.verify(folder)
    large.write_bytes(b"1" * 140_001)
    assert f"{large}: has 140001 bytes; it was saved with 140000" in problem(folder)
