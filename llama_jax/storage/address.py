"""Local paths and addresses: which is which, and what both have in common."""

from __future__ import annotations

import difflib
import os
import re
import time
from pathlib import Path

import numpy as np

from llama_jax.errors import StoreError
from llama_jax.storage.reading import read_object
from llama_jax.storage.store_path import SCHEMES, StorePath

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_RECENT_SECONDS = 60.0
_recent: dict[str, tuple[float, os.stat_result]] = {}
_ALIASES = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}  # of other programs


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path names something in a store: any SCHEME://."""
    return isinstance(path, StorePath) or _SCHEME.match(os.fspath(path)) is not None


def as_path(path: str | os.PathLike[str]) -> Path:
    """Returns a local path, or the `StorePath` of an address.

    Raises:
      StoreError: for a scheme other than gs and s3, or an address without a bucket.
    """
    if isinstance(path, Path):
        return path
    text = os.fspath(path)
    found = _SCHEME.match(text)
    if found is None:
        return Path(text)
    scheme = found[1]
    if scheme not in SCHEMES:
        raise StoreError(f"{text}: {_advice(scheme, text[found.end() :])}")
    bucket = text[found.end() :].partition("/")[0]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]+", bucket):
        problem = f"{bucket!r} is no bucket's name" if bucket else "names no bucket"
        raise StoreError(f"{text}: {problem}; an address is {scheme}://BUCKET/KEY")
    return StorePath(text)


def local_file(path: Path) -> bool:
    """Whether a path is one of this machine's file systems."""
    return not isinstance(path, StorePath)


def status(path: str) -> os.stat_result:
    """Size and time of modification, of an object as they were at most a minute ago: each look is a request.

    Raises:
      OSError: if there is none.
      StoreError: if the store cannot say.
    """
    if not is_address(path):
        return os.stat(path)  # noqa: PTH116  # faster
    known = _recent.get(path)
    if known is None or time.monotonic() - known[0] > _RECENT_SECONDS:
        known = _recent[path] = time.monotonic(), as_path(path).stat()
    return known[1]


def read_range(path: Path, offset: int, nbytes: int) -> np.ndarray:
    """Reads a part of a file or object.

    A local file is read and not memory-mapped: one that another process truncates gives fewer bytes here,
    instead of SIGBUS. A large part of an object is read by several requests at a time.

    Args:
      path: the file; of an object the version that this process opened first.
      offset: position of the first byte.
      nbytes: how many bytes to read.

    Returns:
      uint8 [n]; n < nbytes only where the file ends.

    Raises:
      OSError: if the file cannot be read.
      StoreError: if the store fails, or the object has changed or vanished since it was opened.
    """
    if isinstance(path, StorePath):
        return read_object(path, offset, nbytes)
    return np.fromfile(path, np.uint8, count=nbytes, offset=offset)


def _advice(scheme: str, rest: str) -> str:
    if scheme.lower() == "file":
        return f"give the path alone: {'/' + rest.lstrip('/')}"
    lower = scheme.lower()
    close = difflib.get_close_matches(lower, SCHEMES, n=1, cutoff=0.5)
    guess = lower if lower in SCHEMES else _ALIASES.get(lower, close[0] if close else None)
    known = "gs:// (Google Cloud Storage) and s3:// (Amazon S3)"
    hint = f"did you mean {guess}://{rest}?" if guess else "copy it to one of these, or to a disk"
    return f"{scheme}:// is not supported, only {known}; {hint}"
