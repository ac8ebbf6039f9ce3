"""Finds a source's files, and detects changes to them during a run."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from llama_jax.errors import DataError

from ..config.data import Format, SourceConfig

INDEX = "tokens.json"  # identifies a folder of token ids
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # lines, or one array
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclasses.dataclass(frozen=True)
class File:
    """One file, with its size and modification time at the start of the run.

    Attributes:
      path: its path.
      name: its path relative to the fixed part of the glob, independent of where the corpus is stored.
      size: in bytes.
      mtime_ns: modification time in nanoseconds.
    """

    path: str
    name: str
    size: int
    mtime_ns: int

    def check(self) -> None:
        """Raises DataError if the file has changed."""
        try:
            now = os.stat(self.path)  # noqa: PTH116  # called for every record, and faster
        except OSError as error:
            raise DataError(f"{self.path} can no longer be read ({error.strerror}); restore it") from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.path} changed during the run; restore it, or start a new run")

    def open(self) -> BinaryIO:
        """Opens the file for reading.

        Raises:
          DataError: if it cannot be read, or has changed.
        """
        self.check()
        try:
            return Path(self.path).open("rb")
        except OSError as error:
            raise DataError(f"{self.path} cannot be read ({error.strerror}); check its permissions") from None

    def read(self, start: int, length: int) -> bytes:
        """Returns `length` bytes at offset `start`."""
        with self.open() as file:
            file.seek(start)
            data = file.read(length)
        if len(data) != length:
            raise DataError(
                f"{self.path} is shorter than at the start of the run; restore it, or start a new run"
            )
        return data


def find_files(config: SourceConfig) -> list[File]:
    """Returns the files that a source's glob matches, sorted by name.

    Raises:
      DataError: if there are none.
    """
    pattern = config.files.replace("{stdlib}", sysconfig.get_paths()["stdlib"])
    pattern = os.path.expanduser(pattern)  # noqa: PTH111  # a glob is not a path
    try:
        found = glob.glob(pattern, recursive=True)  # noqa: PTH207  # Path.glob needs a root directory
        paths = [path for path in found if Path(path).is_file()]
    except OSError as error:
        raise DataError(f"the glob {config.files!r} cannot be read ({error.strerror})") from None
    kept = [path for path in paths if not any(fnmatch.fnmatch(path, skip) for skip in config.exclude)]
    if not kept:
        raise DataError(_no_files_message(config, pattern, len(paths)))
    root = _fixed_part(pattern)
    files = []
    for path in kept:
        info = Path(path).stat()
        name = Path(os.path.relpath(path, root)).as_posix()
        files.append(File(path, name, info.st_size, info.st_mtime_ns))
    return sorted(files, key=lambda file: file.name)


def _no_files_message(config: SourceConfig, pattern: str, found: int) -> str:
    if found:
        return f"data.exclude leaves none of the {found} files that {config.files!r} matches; exclude fewer"
    if Path(pattern).is_dir():
        return (
            f"{config.files!r} is a directory without {INDEX}; to match its files use '{config.files}/**/*'"
        )
    where = "" if Path(pattern).is_absolute() else f" (relative to {Path.cwd()})"
    return f"no file matches data.files = {config.files!r}{where}; check the path"


def _fixed_part(pattern: str) -> Path:
    """Returns the folder before the first wildcard."""
    parts = Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:fixed])


def detect_format(files: Iterable[File], config: SourceConfig) -> Format:
    """Returns the format of a source's files; `auto` detects it from their names.

    Raises:
      DataError: if the names indicate several formats.
    """
    if config.format != "auto":
        return config.format
    seen: dict[Format, str] = {}
    for file in files:
        seen.setdefault(_SUFFIXES.get(Path(file.name).suffix.lower(), "text"), file.name)
    if len(seen) > 1:
        (first, a), (second, b) = list(seen.items())[:2]
        raise DataError(
            f"{config.files!r} matches files of several formats ({first}: {a}, {second}: {b}); narrow it, "
            "set data.format, or give each format its own [[data.mixture]]"
        )
    return next(iter(seen))


def read_chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yields the rest of an open file in chunks of at most `size` bytes."""
    while chunk := file.read(size):
        yield chunk


def sampled_digest(file: File) -> bytes:
    """Hashes a file's size and some evenly spaced samples, at a cost independent of its size."""
    digest = hashlib.blake2b(str(file.size).encode(), digest_size=16)
    last = max(0, file.size - _SAMPLE_BYTES)
    with file.open() as opened:
        for start in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
            opened.seek(start)
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.digest()
