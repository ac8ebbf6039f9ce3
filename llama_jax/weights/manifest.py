"""Checksum manifests of a directory: written before a checkpoint is committed, verified before it is used.

A manifest lists every file under its directory with size and SHA-256; the data files of arrays that have
`digests` only with their size, as reading the arrays verifies them. In an object store it has the store's own
checksums, so that nothing is read again, and the manifest, written last, is what commits a checkpoint. For a
subdirectory with its own manifest it lists only that, so that one item of a checkpoint can be verified alone.
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
from llama_jax.storage import StorePath
from llama_jax.storage.client import Info
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.source import open_file, os_error_reason

NAME = "checksums.json"
_QUICK_MAX_BYTES = 1 << 17  # metadata files are smaller, parameter arrays are larger
_MAX_DEPTH = 8  # of nested manifests


class Entry(NamedTuple):
    """A file's path, size in bytes and hash, as recorded in a manifest."""

    path: Path
    size: int
    sha256: str | None


def write_manifest(folder: Path, *, arrays_have_digests: bool = False) -> None:
    """Writes the manifest of all files under `folder`, atomically.

    Args:
      folder: the directory.
      arrays_have_digests: whether large files are those of arrays with digests, and are not hashed.

    Raises:
      OSError: if a file cannot be read, or the manifest cannot be written.
    """
    files: dict[str, list[Any]] = {}
    if isinstance(folder, StorePath):  # which has computed a checksum of each object
        found = _objects(folder)
        files = {name: [info.size, info.digest] for name, info in found.items()}
        (folder / NAME).write_bytes(_encode(files))
        return
    for path in _files(folder):
        size, sha256 = path.stat().st_size, None
        if size <= _QUICK_MAX_BYTES or not arrays_have_digests:
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = [size, sha256]
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
    entries = [entry for entry in entries if entry.sha256 and not (quick and entry.size > _QUICK_MAX_BYTES)]
    hashed = entries[index::count]
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
    objects = _objects(folder) if isinstance(folder, StorePath) else {}
    found = set(objects) or {found.relative_to(folder).as_posix() for found in _files(folder)}
    for name in sorted(found ^ set(entries)):
        problem = "missing" if name in entries else "was not there when the checkpoint was saved"
        raise CheckpointError(f"{folder / name}: {problem}")
    for name, entry in entries.items():
        try:
            size = objects[name].size if objects else entry.path.stat().st_size
        except OSError as error:  # deleted since it was listed
            raise CheckpointError(f"{entry.path}: cannot be read: {os_error_reason(error)}") from None
        if size != entry.size:
            raise CheckpointError(f"{entry.path}: has {size} bytes; it was saved with {entry.size}")
        if objects and entry.sha256 and _differ(objects[name].digest, entry.sha256):
            raise CheckpointError(f"{entry.path}: damaged: its checksum does not match")
    nested = [
        inner for entry in entries.values() if entry.path.name == NAME for inner in _read_nested(entry, depth)
    ]
    return [*entries.values(), *nested]


def _read_nested(entry: Entry, depth: int) -> list[Entry]:
    _check_hash(entry)
    return read_manifest(entry.path.parent, depth + 1)


def _check_hash(entry: Entry) -> None:
    # A store compares its own checksums: a copy on a disk has its size alone to compare.
    if entry.sha256 is None or ":" in entry.sha256:
        return
    with open_file(entry.path) as (file, _):
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:  # type: ignore[arg-type]
            raise CheckpointError(f"{entry.path}: damaged: its checksum does not match")


def _differ(found: str, saved: str) -> bool:
    """Whether two checksums of a store say that an object has changed; those of different kinds do not."""
    return found.partition(":")[0] == saved.partition(":")[0] and found != saved


def _objects(folder: StorePath) -> dict[str, Info]:
    """Returns the objects that the manifest of `folder` lists, by name: as `_files`, in one listing."""
    found = {path.relative_to(folder).parts: info for path, info in folder.find().items()}
    nested = {parts[:-1] for parts in found if parts[-1] == NAME and len(parts) > 1}
    outer = {parts for parts in nested if not any(parts[:depth] in nested for depth in range(1, len(parts)))}

    def listed(parts: tuple[str, ...]) -> bool:
        inside = next((parts[:depth] for depth in range(1, len(parts)) if parts[:depth] in outer), None)
        return parts[-1] == NAME and parts[:-1] == inside if inside else parts != (NAME,)

    return {"/".join(parts): info for parts, info in found.items() if listed(parts)}


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
    return (
        inside
        and isinstance(value, list)
        and [type(part) for part in value] in ([int, str], [int, type(None)])
    )


def _encode(files: dict[str, list[Any]]) -> bytes:
    """Returns a manifest's bytes, including its own checksum."""
    text = json.dumps(files, indent=0, sort_keys=True)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{checksum}", "files": {text}}}\n'.encode()
