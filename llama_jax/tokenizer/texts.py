"""Reads text and JSON Lines files as training data of a vocabulary."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from llama_jax.errors import TokenizerError
from llama_jax.storage import as_path, is_address
from llama_jax.tokenizer.files import one_line

_CHUNK_CHARACTERS = 1 << 20
_MAX_LINE_CHARACTERS = 64 << 20
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")
_OPENERS: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_NOT_TEXT = {
    ".zst": "compressed with zstd, which Python cannot read: zstd -d decompresses it",
    **dict.fromkeys((".parquet", ".arrow", ".feather"), "a table"),
    **dict.fromkeys((".zip", ".tar", ".tgz"), "an archive"),
}


def find_files(names: Sequence[str]) -> list[Path]:
    """Returns the files that match paths and globs, in order and without duplicates.

    Raises:
      TokenizerError: for the first name that matches no file.
    """
    found: dict[Path, None] = {}
    for name in names:
        files = _store_files(as_path(name)) if is_address(name) else _local_files(name)
        if not files:
            raise TokenizerError(f"no file matches {name!r} (relative to {Path.cwd()}); check the path")
        found.update(dict.fromkeys(files))
    return list(found)


def _local_files(name: str) -> list[Path]:
    matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))  # noqa: PTH207
    return [Path(match) for match in matches if Path(match).is_file()]


def _store_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    fixed = next((i for i, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts) - 1)
    folder = path.parents[len(path.parts) - fixed - 1]
    return [found for found in sorted(folder.glob("/".join(path.parts[fixed:]))) if found.is_file()]


def read_texts(paths: Iterable[Path], field: str) -> Iterator[str]:
    """Yields the text of files: one `field` of each record of JSON, other files in chunks.

    A name that ends in .gz, .bz2 or .xz is decompressed; a .json file holds records a line, or one array.

    Raises:
      TokenizerError: if a file cannot be read or is not UTF-8, or a record is not an object with that field.
    """
    for path in paths:
        opener = _OPENERS.get(path.suffix.lower())
        suffix = (Path(path.stem) if opener else path).suffix.lower()
        if suffix in _NOT_TEXT:
            raise TokenizerError(f"{path} is {_NOT_TEXT[suffix]}; give text or JSON Lines")
        try:
            with (
                path.open("rb") as opened,
                opener(opened, "rt", encoding="utf-8-sig", newline="")
                if opener
                else io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as file,
            ):
                if suffix in _JSON_LINES_SUFFIXES:
                    yield from _fields(path, file, field)
                elif suffix == ".json":
                    yield from _json(path, file, field)
                else:
                    yield from iter(lambda: file.read(_CHUNK_CHARACTERS), "")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 ({error.reason}); give text files only") from None
        except (EOFError, lzma.LZMAError, zlib.error) as error:
            raise TokenizerError(f"{path} is damaged ({one_line(error)}); take a fresh copy") from None
        except OSError as error:
            raise TokenizerError(
                f"{path} cannot be read ({error.strerror or error}); check the file"
            ) from None


def _json(path: Path, file: TextIO, field: str) -> Iterator[str]:
    """The texts of a .json file: an array of records, or a record a line."""
    start = file.read(_MAX_LINE_CHARACTERS)
    if not start.lstrip().startswith("["):
        file.seek(0)
        yield from _fields(path, file, field)
        return
    if len(start) == _MAX_LINE_CHARACTERS:
        raise TokenizerError(f"{path} is an array of over 64 MB; write it as JSON Lines, a record a line")
    try:
        records = json.loads(start)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON ({one_line(error)}); fix the file") from None
    for number, value in enumerate(records, 1):
        yield _text(f"{path}: record {number}", value, field)


def _fields(path: Path, file: TextIO, field: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_CHARACTERS), ""), 1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{path}:{number}: not JSON ({one_line(error)}); fix the line") from None
        yield _text(f"{path}:{number}", value, field)


def _text(place: str, value: Any, field: str) -> str:
    text = value.get(field) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise TokenizerError(f"{place}: not an object with a text field {field!r}; see --field")
    return text
