"""Checksum manifests of a directory: written before a checkpoint is committed, verified before it is used.

A manifest lists every file under its directory with size and SHA-256. For a subdirectory with its own
manifest it lists only that manifest, so that each process can hash the files it wrote, and one item of a
checkpoint can be verified alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.errors import CheckpointError
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.source import open_file, os_error_reason

NAME = "checksums.json"
_QUICK_MAX_BYTES = 1 << 16  # metadata files are smaller, parameter arrays are larger
_MAX_DEPTH = 8  # of nested manifests


class Entry(NamedTuple):
    """A file's path, size in bytes and hash, as recorded in a manifest."""

    path: Path
    size: int
    sha256: str


def write_manifest(folder: Path) -> None:
    """Writes the manifest of all files under `folder`, atomically.

    Raises:
      OSError: if a file cannot be read, or the manifest cannot be written.
    """
    files: dict[str, list[Any]] = {}
    for path in _files(folder):
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = [path.stat().st_size, sha256]
    temporary = folder / f"{NAME}.tmp"
    with temporary.open("wb") as file:
        file.write(_encode(files))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


def verify(folder: Path, *, quick: bool = False, shard: tuple[int, int] = (0, 1)) -> None:
    """Verifies the files under `folder` against its manifest.

    Args:
      folder: the directory with the manifest.
      quick: check the names and sizes of all files, but hash only small files.
      shard: (index, count): names and sizes are always checked, but only every `count`-th file is hashed, so
        that `count` processes together hash every file once.

    Raises:
      CheckpointError: naming the first file that is missing, unexpected, of another size, or changed.
    """
    entries = sorted(read_manifest(folder), key=lambda entry: (-entry.size, entry.path))
    index, count = shard
    hashed = [entry for entry in entries[index::count] if not quick or entry.size <= _QUICK_MAX_BYTES]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(_check_hash, hashed):
            pass


def read_manifest(folder: Path, depth: int = 0) -> list[Entry]:
    """Reads a manifest and those of its subdirectories, and checks the names and sizes of their files.

    Raises:
      CheckpointError: if a manifest is missing or damaged, or a file is missing, unexpected or of another
        size.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: there is no {NAME}: the save was interrupted, or llama_jax did not write it"
        )
    fields = read_json(path)
    files = fields.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())) or depth > _MAX_DEPTH:
        raise CheckpointError(f"{path}: damaged: not a list of files and checksums")
    with open_file(path) as (file, _):
        if file.read() != _encode(files):
            raise CheckpointError(f"{path}: damaged: its own checksum does not match")
    entries = {name: Entry(folder / name, size, sha256) for name, (size, sha256) in files.items()}
    found = {found.relative_to(folder).as_posix() for found in _files(folder)}
    for name in sorted(found ^ set(entries)):
        problem = "missing" if name in entries else "was not there when the checkpoint was saved"
        raise CheckpointError(f"{folder / name}: {problem}")
    for entry in entries.values():
        size = entry.path.stat().st_size
        if size != entry.size:
            raise CheckpointError(f"{entry.path}: has {size} bytes; it was saved with {entry.size}")
    nested = [
        inner for entry in entries.values() if entry.path.name == NAME for inner in _read_nested(entry, depth)
    ]
    return [*entries.values(), *nested]


def _read_nested(entry: Entry, depth: int) -> list[Entry]:
    _check_hash(entry)
    return read_manifest(entry.path.parent, depth + 1)


def _check_hash(entry: Entry) -> None:
    with open_file(entry.path) as (file, _):
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:  # type: ignore[arg-type]
            raise CheckpointError(f"{entry.path}: damaged: its checksum does not match")


def _files(folder: Path) -> Iterator[Path]:
    """Yields the files that the manifest of `folder` lists, in order."""
    for path in sorted(_children(folder)):
        if path.is_dir() and not path.is_symlink():
            nested = path / NAME
            yield from [nested] if nested.exists() else _files(path)
        elif path.name not in (NAME, f"{NAME}.tmp"):
            yield path


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read: {os_error_reason(error)}; check its permissions"
        ) from None


def _is_entry(item: tuple[str, object]) -> bool:
    """Whether an item is a relative path inside the directory, with a size and a checksum."""
    name, value = item
    inside = not {"", ".", ".."} & set(name.split("/")) and "\0" not in name
    return inside and isinstance(value, list) and [type(part) for part in value] == [int, str]


def _encode(files: dict[str, list[Any]]) -> bytes:
    """Returns a manifest's bytes, including its own checksum."""
    text = json.dumps(files, indent=0, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{checksum}", "files": {text}}}\n'.encode()
