"""Reading text files and JSON lines for a vocabulary to learn from."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.files import one_line

_PART = 1 << 20  # characters read at a time
_LONGEST = 64 << 20  # characters of one JSON line
_JSON_LINES = (".jsonl", ".ndjson")


def find_files(names: Sequence[str]) -> list[Path]:
    """Returns the files that paths and globs name, each once, in the order given.

    Raises:
      TokenizerError: naming the first that names none.
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
    """Yields the text of files, in parts: of JSON lines one `field`, of others everything.

    Raises:
      TokenizerError: if a file cannot be read, is not UTF-8, or has a line that is no such JSON.
    """
    for path in paths:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                if path.suffix.lower() in _JSON_LINES:
                    yield from _fields(path, file, field)
                else:
                    yield from iter(lambda: file.read(_PART), "")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not UTF-8 ({error.reason}); give text files only") from None
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def _fields(path: Path, file: TextIO, field: str) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(_LONGEST), ""), 1):
        if line.isspace():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TokenizerError(f"{path}:{number}: not JSON ({one_line(error)}); mend the line") from None
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise TokenizerError(f"{path}:{number}: no object with the text field {field!r}; see --field")
        yield text
