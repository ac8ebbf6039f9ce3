"""Checksums of a folder's files: written before a checkpoint is committed, compared before it is believed.

A manifest lists every file under its folder with size and SHA-256. A subfolder with a manifest of its own
stands in it by that one file, so that each of many processes can hash what it wrote itself, and one item of
a checkpoint can be checked alone.
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
from llama_jax.weights.safetensors import read_json
from llama_jax.weights.source import open_file, reason

NAME = "checksums.json"
_QUICK = 1 << 16  # bytes; metadata files are smaller, arrays that matter are larger
_DEEPEST = 8  # folders within folders


class Entry(NamedTuple):
    """A file as it was when its manifest was written."""

    path: Path
    size: int
    sha256: str


def write_manifest(folder: Path) -> None:
    """Lists all files under `folder` in its manifest, which appears whole or not at all.

    Raises:
      OSError: if a file cannot be read, or the manifest not be written.
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


def verify(folder: Path, *, quick: bool = False, share: tuple[int, int] = (0, 1)) -> None:
    """Compares the files under `folder` with its manifest.

    Args:
      folder: where the manifest is.
      quick: compare names and sizes of all files, but the bytes of small ones alone.
      share: (index, count): names and sizes are always compared, and of the bytes one part in `count`, so
        that `count` processes together read everything once.

    Raises:
      CheckpointError: naming the first file that is missing, unexpected, of another size, or changed.
    """
    entries = sorted(read_manifest(folder), key=lambda entry: (-entry.size, entry.path))
    mine = [entry for entry in entries[share[0] :: share[1]] if not quick or entry.size <= _QUICK]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(_compare, mine):
            pass


def read_manifest(folder: Path, depth: int = 0) -> list[Entry]:
    """Reads a manifest and those of its subfolders, and compares the names and sizes of their files.

    Raises:
      CheckpointError: if a manifest is missing or damaged, or a file is missing, unexpected or of another
        size.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: there is no {NAME}: it was not saved to the end, or not by llama_jax"
        )
    fields = read_json(path)
    files = fields.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())) or depth > _DEEPEST:
        raise CheckpointError(f"{path}: damaged: it is no list of files and checksums")
    with open_file(path) as (file, _):
        if file.read() != _encode(files):
            raise CheckpointError(f"{path}: damaged: it is not as it was written")
    entries = {name: Entry(folder / name, size, sha256) for name, (size, sha256) in files.items()}
    found = {found.relative_to(folder).as_posix() for found in _files(folder)}
    for name in sorted(found ^ set(entries)):
        problem = "missing" if name in entries else "was not there when the checkpoint was saved"
        raise CheckpointError(f"{folder / name}: {problem}")
    for entry in entries.values():
        size = entry.path.stat().st_size
        if size != entry.size:
            raise CheckpointError(f"{entry.path}: has {size} bytes; it was saved with {entry.size}")
    below = [
        inner for entry in entries.values() if entry.path.name == NAME for inner in _nested(entry, depth)
    ]
    return [*entries.values(), *below]


def _nested(entry: Entry, depth: int) -> list[Entry]:
    _compare(entry)
    return read_manifest(entry.path.parent, depth + 1)


def _compare(entry: Entry) -> None:
    with open_file(entry.path) as (file, _):
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:  # type: ignore[arg-type]
            raise CheckpointError(f"{entry.path}: damaged: its bytes are not those that were saved")


def _files(folder: Path) -> Iterator[Path]:
    """Yields what a manifest of `folder` lists, in order."""
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
        raise CheckpointError(f"{folder}: cannot be read: {reason(error)}; check its permissions") from None


def _is_entry(item: tuple[str, object]) -> bool:
    """Whether a name leads to a file under the folder, with a size and a checksum."""
    name, value = item
    inside = not {"", ".", ".."} & set(name.split("/")) and "\0" not in name
    return inside and isinstance(value, list) and [type(part) for part in value] == [int, str]


def _encode(files: dict[str, list[Any]]) -> bytes:
    """Returns a manifest's bytes, its own checksum among them."""
    text = json.dumps(files, indent=0, sort_keys=True)
    own = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{own}", "files": {text}}}\n'.encode()
