"""Finds, verifies and makes the index of a source's text or JSON files.

The index is kept in the folder `.llama_jax` beside the files or, where that cannot be written, in the cache.
That of objects in a store is kept in the cache, where it can be mapped, and published beside the objects,
from where other hosts fetch it.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llama_jax.console import terminal
from llama_jax.errors import DataError

from .compression import Plain
from .files import File, sampled_digest
from .index import VERSION, DamagedIndexError, Index
from .index_making import FILE_BYTES, Making, join
from .index_parts import Range, read_part, write_part
from .pieces import Kind
from .stored_index import fetch_index, index_paths, offer_index

SMALL_BYTES = 256 << 20  # up to this size files are indexed in memory at each start
_SAMPLED_FILES = 16  # whose samples are compared at a start
_READ_AT_ONCE = 16


def open_index(files: Sequence[File], kind: Kind, plain: Plain) -> Index:
    """Returns the index of files; makes it if there is none that fits them.

    Args:
      files: the files, as they were found.
      kind: how they are divided into records.
      plain: decompresses files and checks that they are text.

    Raises:
      DataError: if a file cannot be read, or changes meanwhile, or the index cannot be written.
    """
    if sum(max(file.size, FILE_BYTES) for file in files) <= SMALL_BYTES:
        return _index_in_memory(files, kind, plain)
    stored, paths = index_paths(files, VERSION, kind)
    if stored is not None:
        fetch_index(stored, paths[0])
    why = ""
    for path in paths:
        found, problem = _find(path, files)
        if found is not None:
            return found
        why = why or problem
    if why:
        terminal.note(f"indexing again: {why}")
    for path in paths:
        build = path.with_suffix(f".{_state(files)}")
        try:
            build.mkdir(parents=True, exist_ok=True)
            probe = build / f"{os.getpid()}.try"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            unwritable = f"{path.parent} cannot be written ({error.strerror})"
            continue
        index = Making(files, kind, plain, path, build, _find).run()
        if stored is not None:
            offer_index(path, stored)
        return index
    raise DataError(f"{unwritable}, and the data needs an index; set LLAMA_JAX_CACHE to a writable directory")


def _state(files: Sequence[File]) -> str:
    """Identifies the files' present content by their times and sizes."""
    facts = np.array([(file.size, file.mtime_ns) for file in files], "<i8")
    return hashlib.blake2b(facts.tobytes(), digest_size=6).hexdigest()


def _find(path: Path, files: Sequence[File]) -> tuple[Index | None, str]:
    """Returns the index at `path` if it fits the files, or why it does not."""
    try:
        index = Index(path)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, DamagedIndexError):
        return None, f"its index {path} cannot be read, or is damaged"
    if len(index.files) != len(files):
        return None, f"its index {path} is of other files"
    stated = np.array([(file.size, file.mtime_ns) for file in files], np.int64)
    differs = (stated[:, 0] != index.files["size"]) | (stated[:, 1] != index.files["mtime_ns"])
    if differs.any():
        return None, f"{files[int(differs.argmax())].path} is newer than the index, or of another size"
    sampled = np.linspace(0, len(files) - 1, min(len(files), _SAMPLED_FILES)).astype(int)
    with concurrent.futures.ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        digests = pool.map(lambda i: sampled_digest(files[i]), sampled.tolist())
        for i, digest in zip(sampled.tolist(), digests, strict=True):
            if digest != index.files["sample"][i].tobytes():
                return None, f"{files[i].path} is not what was indexed, though of the same size and time"
    return index, ""


def _index_in_memory(files: Sequence[File], kind: Kind, plain: Plain) -> Index:
    out, part = io.BytesIO(), io.BytesIO()
    unit = tuple(Range(i) for i in range(len(files)))
    write_part(part, unit, files, kind, plain=plain, progress=lambda _: None, sampled=False)
    join(files, read_part(np.frombuffer(part.getbuffer(), np.uint8)), out, None)
    return Index(data=out.getvalue())
