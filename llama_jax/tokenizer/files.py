"""Reads whole small files, with a limit on their size and one-line errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama_jax.errors import TokenizerError

# The largest vocabularies in use have 35 MB; larger files than this are not read.
MAX_BYTES = 64 << 20
MAX_IDS = 1 << 22  # far beyond any vocabulary; a larger id in a file would allocate too large a table


def read_bytes(path: Path) -> bytes:
    """Returns a file's bytes.

    Raises:
      TokenizerError: if it is missing, unreadable, not a regular file, or larger than any vocabulary.
    """
    try:
        if not path.exists():
            raise TokenizerError(f"{path} does not exist; give a tokenizer file or a model's directory")
        if not path.is_file():
            raise TokenizerError(f"{path} is not a regular file; give a tokenizer file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise TokenizerError(
                f"{path} has {size} bytes; no tokenizer has more than {MAX_BYTES}, give another file"
            )
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions"
        ) from None


def parse_json_object(path: Path, data: bytes) -> dict[str, Any]:
    """Parses `data`, the bytes of `path`, as a JSON object.

    Raises:
      TokenizerError: if it is anything else.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON ({one_line(error)}); take a fresh copy") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is a JSON {type(value).__name__}, not an object; take a fresh copy")
    return value


def one_line(error: BaseException) -> str:
    """Returns the first 120 characters of an error message, on one line."""
    return " ".join(str(error).split())[:120]
