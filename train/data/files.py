"""Finds a source's files, and detects changes to them during a run."""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from llama_jax.errors import DataError
from llama_jax.storage import StorePath, as_path, is_address, read_range, status

from ..config.data import Format, SourceConfig
from .folders import dataset_files, folder_advice, is_metadata

INDEX_FOLDER = ".llama_jax"  # beside the files; a glob's wildcards match no hidden names
INDEX = "tokens.json"  # identifies a folder of token ids
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz", ".lz4": "lz4"}
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",  # lines, or one array
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "csv",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}
_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclasses.dataclass(frozen=True)
class Copy:
    """A file's content in a form that can be indexed, in the cache (cache.py).

    Attributes:
      path: of the copy.
      size: its size in bytes.
      key: identifies the original's content and what was done to it.
    """

    path: str
    size: int
    key: str


@dataclasses.dataclass(frozen=True)
class File:
    """One file, with its size and modification time at the start of the run.

    Attributes:
      path: its path.
      name: its path relative to the fixed part of the glob, independent of where the corpus is stored; of a
        compressed file the name of the decompressed one, so that both give the same batches.
      size: in bytes.
      mtime_ns: modification time in nanoseconds.
      copy: what is read in its place, or None.
    """

    path: str
    name: str
    size: int
    mtime_ns: int
    copy: Copy | None = None

    @property
    def content(self) -> str:
        """The path that is read."""
        return self.copy.path if self.copy else self.path

    @property
    def nbytes(self) -> int:
        """The number of bytes that are read."""
        return self.copy.size if self.copy else self.size

    def check(self) -> None:
        """Raises DataError if the file has changed."""
        try:
            now = status(self.path)  # called for every record
        except OSError as error:
            raise DataError(f"{self.path} can no longer be read ({error.strerror}); restore it") from None
        if (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.path} changed during the run; restore it, or start a new run")

    def open(self) -> BinaryIO:
        """Opens the file's content for reading.

        Raises:
          DataError: if it cannot be read, or has changed.
        """
        self.check()
        try:
            return as_path(self.content).open("rb")
        except OSError as error:
            if self.copy:
                raise DataError(
                    f"the copy of {self.path} in the cache, {self.content}, cannot be read "
                    f"({error.strerror}); run the same command again"
                ) from None
            raise DataError(f"{self.path} cannot be read ({error.strerror}); check its permissions") from None

    def read(self, start: int, length: int) -> bytes:
        """Returns `length` bytes at offset `start`."""
        if is_address(self.content):
            self.check()
            data = read_range(as_path(self.content), start, length).tobytes()
        else:
            with self.open() as file:
                file.seek(start)
                data = file.read(length)
        if len(data) != length:
            raise DataError(
                f"{self.path} is shorter than at the start of the run; restore it, or start a new run"
            )
        return data


def find_files(config: SourceConfig) -> list[list[File]]:
    """Returns the files that each of a source's globs matches, sorted by name.

    A folder that `datasets` saved stands for its data files, in its own order.

    Raises:
      DataError: if a glob matches none.
    """
    found = [_matches(pattern, config.exclude) for pattern in config.patterns]
    roots = {root.absolute() for root, _ in found}
    common = common_folder(roots) if len(roots) > 1 else None
    groups = []
    for pattern, (root, paths) in zip(config.patterns, found, strict=True):
        files = [_file(path, common or root) for path in paths]
        names: dict[str, str] = {}
        for file in files:
            if (other := names.setdefault(file.name, file.path)) != file.path:
                raise DataError(
                    f"{pattern!r} matches {other} and {file.path}, compressed and not; narrow it, or leave "
                    f'one out with data.exclude = ["*{Path(file.path).suffix}"]'
                )
        groups.append(files)
    return groups


def common_folder(roots: Iterable[Path]) -> Path | None:
    """The folder that all are in; None if some are on a disk and some in a bucket, or in several buckets."""
    parts = [root.parts for root in roots]
    same = list(itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))
    stores = any(is_address(root) for root in roots)
    if len(same) < (2 if stores else 1):
        return None
    first = next(iter(roots))
    return [first, *first.parents][len(first.parts) - len(same)]


def _matches(pattern: str, exclude: Sequence[str]) -> tuple[Path, list[str]]:
    """Returns the folder that a glob's names are relative to, and its files in order."""
    expanded = os.path.expanduser(  # noqa: PTH111  # a glob is not a path
        pattern.replace("{stdlib}", sysconfig.get_paths()["stdlib"])
    )
    given = as_path(expanded)
    literal = given.exists()  # its name may have brackets
    root = given.parent if literal else _fixed_part(given)
    try:
        if isinstance(root, StorePath):
            files, folders = _listed(root, given, literal=literal)
        else:
            # Path.glob needs a root directory
            found = [expanded] if literal else glob.glob(expanded, recursive=True)  # noqa: PTH207
            files = [path for path in found if Path(path).is_file()]
            folders = [path for path in found if Path(path).is_dir()] if "**" not in expanded else []
    except OSError as error:
        raise DataError(f"the glob {pattern!r} cannot be read ({error.strerror})") from None
    data = [path for path in files if not is_metadata(as_path(path))]
    if files and not data:
        folder = str(Path(files[0]).parent)
        raise DataError(f"{files[0]} describes a Hugging Face dataset; to read it use {folder!r}")
    paths = sorted(data, key=lambda path: _name(path, root))
    for path in sorted(folders):
        if (saved := dataset_files(as_path(path))) is not None:
            paths += map(str, saved[1])
            root = saved[0] if path == expanded else root
    kept = [path for path in paths if not any(fnmatch.fnmatch(path, skip) for skip in exclude)]
    if not kept:
        raise DataError(_no_files_message(pattern, expanded, len(paths)))
    return root, kept


def _file(path: str, root: Path) -> File:
    info = as_path(path).stat()
    return File(path, _name(path, root), info.st_size, info.st_mtime_ns)


def _name(path: str, root: Path) -> str:
    name = PurePosixPath(os.path.relpath(path, root)).as_posix()
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    return stem if suffix.lower() in COMPRESSED else name


def _no_files_message(pattern: str, expanded: str, found: int) -> str:
    if found:
        return f"data.exclude leaves none of the {found} files that {pattern!r} matches; exclude fewer"
    if as_path(expanded).is_dir():
        return folder_advice(as_path(expanded), pattern, INDEX)
    where = "" if as_path(expanded).is_absolute() else f" (relative to {Path.cwd()})"
    hint = "; in a glob the bracket [ is written [[]" if "[" in expanded else ""
    return f"no file matches data.files = {pattern!r}{where}; check the path{hint}"


def _fixed_part(pattern: Path) -> Path:
    """Returns the folder before the first wildcard."""
    parts = pattern.parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return pattern.parents[len(parts) - fixed - 1]


def _listed(root: StorePath, pattern: Path, *, literal: bool) -> tuple[list[str], list[str]]:
    """Returns the objects and folders of a store that match a glob, by one listing of `root`."""
    if literal:
        return ([str(pattern)], []) if pattern.is_file() else ([], [str(pattern)])
    below = "/".join(pattern.parts[len(root.parts) :])
    found = list(root.matches(below))
    files = [str(path) for path, is_object in found if is_object and INDEX_FOLDER not in path.parts]
    return files, [str(path) for path, is_object in found if not is_object]


def detect_format(files: Iterable[File], config: SourceConfig) -> Format:
    """Returns the format of the files that a glob matches; `auto` detects it from their names.

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
            f"{config.title!r} matches files of several formats ({first}: {a}, {second}: {b}); narrow it, "
            "set data.format, or make data.files a list with a glob for each format"
        )
    return next(iter(seen))


def read_chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yields the rest of an open file in chunks of at most `size` bytes."""
    while chunk := file.read(size):
        yield chunk


def sampled_digest(file: File) -> bytes:
    """Hashes a file's size and some evenly spaced samples, at a cost independent of its size."""
    digest = hashlib.blake2b(str(file.nbytes).encode(), digest_size=16)
    last = max(0, file.nbytes - _SAMPLE_BYTES)
    with file.open() as opened:
        for start in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
            opened.seek(start)
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.digest()


def whole_digest(files: Iterable[File]) -> str:
    """Hashes all that is read of files."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open() as opened:
            for part in read_chunks(opened, 1 << 20):
                digest.update(part)
        digest.update(file.nbytes.to_bytes(8, "little"))
    return digest.hexdigest()
