"""Reads text and JSON Lines files as training data of a vocabulary."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.files import one_line

_CHUNK_CHARACTERS = 1 << 20
_MAX_LINE_CHARACTERS = 64 << 20
_JSON_LINES_SUFFIXES = (".jsonl", ".ndjson")


def find_files(names: Sequence[str]) -> list[Path]:
    """Returns the files that match paths and globs, in order and without duplicates.

    Raises:
      TokenizerError: for the first name that matches no file.
    """
    found: dict[Path, None] = {}
    for name in names:
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))  # noqa: PTH207
        files = [Path(match) for match in matches if Path(match).is_file()]
        if not files:
            raise TokenizerError(f"no file matches {name!r} (relative to {Path.cwd()}); check the path")
        found.update(dict.fromkeys(files))
    return list(found)


def read_texts(paths: Iterable[Path], field: str) -> Iterator[str]:
    """Yields the text of files: one `field` of each line of JSON Lines, other files in chunks.

    Raises:
      TokenizerError: if a file cannot be read or is not UTF-8, or a line is not an object with that field.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                if path.suffix.lower() in _JSON_LINES_SUFFIXES:
                    yield from _fields(path, file, field)
                else:
                    yield from iter(lambda: file.read(_CHUNK_CHARACTERS), "")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 ({error.reason}); give text files only") from None
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def _fields(path: Path, file: TextIO, field: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_CHARACTERS), ""), 1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{path}:{number}: not JSON ({one_line(error)}); fix the line") from None
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise TokenizerError(f"{path}:{number}: not an object with a text field {field!r}; see --field")
        yield text
