"""Reads small JSON files: strict parsing, and an object whose fields are checked for their types."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import CheckpointError
from llama_jax.weights.source import open_file, quote

# Hundreds of times what models have; parsed, a hostile file takes 25 times its size.
MAX_JSON_BYTES = 16 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a small file.

    Raises:
      CheckpointError: if the file is missing, is not a JSON object, or has a duplicate key.
    """
    with open_file(path) as (file, size):
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: a JSON file of {size} bytes; at most {MAX_JSON_BYTES} are read")
        return parse_json(path, file.read())


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parses a JSON object and rejects duplicate keys.

    Raises:
      CheckpointError: if `text` is not a JSON object, or has a duplicate key; `path` is for the message.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) != len(pairs):
            seen: set[str] = set()
            duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{path}: {quote(duplicate)} appears twice; the file is malformed")
        return keys

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError also covers invalid UTF-8 and huge integers
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: not valid JSON: {detail}; download the file again") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: holds a JSON {type(parsed).__name__} where an object is expected")
    return parsed


class JsonFields:
    """The fields of a JSON object, each checked for its type on access.

    Args:
      path: the file, for error messages.
      fields: the parsed object.
    """

    def __init__(self, path: Path, fields: Mapping[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a field, or `default` if it is absent or null; without a default the field is required."""
        value = self.fields.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"{key} is missing; use the {self.path.name} that was saved with the model")
        return value

    def integer(self, key: str, default: int | None = None, *, minimum: int | None = None) -> int:
        """Returns an integer below 2^31; `minimum` does not apply to the default."""
        value = self.get(key, default)
        valid = type(value) is int and value < 1 << 31
        if not valid or (minimum is not None and value < minimum and value != default):
            rule = "a whole number below 2^31" + ("" if minimum is None else f", at least {minimum}")
            raise self.error(f"{key} is {quote(str(value))}; it must be {rule}")
        return int(value)

    def number(self, key: str, default: float | None = None, *, positive: bool = False) -> float:
        """Returns a finite number."""
        value = self.get(key, default)
        number = type(value) in (int, float)
        if not number or not (0 < value < 1e30 if positive else abs(value) < 1e300):
            rule = "a finite number above 0" if positive else "a finite number"
            raise self.error(f"{key} is {quote(str(value))}; it must be {rule}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Returns a boolean; absent and null are False."""
        value = self.get(key, False)
        if type(value) is not bool:
            raise self.error(f"{key} is {quote(str(value))}; it must be true or false")
        return value

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")
