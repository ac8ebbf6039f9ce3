"""Prepared data in an object store: each shard is sent when it is written, the manifests last.

Chunks and the shard that is being written are on this machine's disk, in the cache. In OUT lies a record of
each shard that has been sent, so that a command that goes on, here or on another machine, sends none again.
The same text makes the same bytes: of two commands at once one does work in vain, and no harm.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llama_jax.errors import StoreError
from llama_jax.storage import StorePath, upload
from llama_jax.storage.cache import cache_folder

_FOLDER = "sent"  # in OUT until the end: a record of each shard


def local_folder(out: StorePath) -> Path:
    """Returns the folder of this machine for what is prepared for a store."""
    name = hashlib.blake2b(str(out).encode(), digest_size=8).hexdigest()
    return cache_folder() / "prepare" / name


def send(path: Path, target: StorePath, out: StorePath, counts: dict[str, Any]) -> None:
    """Sends a shard, then the record of it, and removes it from the disk.

    Args:
      path: the shard.
      target: its object, below `out`.
      out: the folder that is prepared.
      counts: its counts, with `size` and `digest`.

    Raises:
      StoreError: if the store refuses or fails.
    """
    upload(path, target)
    info = target.info()
    if info.size != counts["size"]:
        raise StoreError(f"{target}: {info.size} of {counts['size']} bytes were stored", transient=True)
    _record(target, out).write_text(json.dumps({**counts, "stored": info.digest}))
    path.unlink()


def sent(target: StorePath, out: StorePath) -> dict[str, Any] | None:
    """Returns the counts of a shard that is in the store as it was sent, or None.

    Raises:
      StoreError: if the store refuses or fails.
    """
    try:
        counts: dict[str, Any] = json.loads(_record(target, out).read_bytes())
        info = target.info()
        as_sent = (info.size, info.digest) == (counts["size"], counts.pop("stored"))
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return counts if as_sent else None


def remove_records(out: StorePath) -> None:
    """Removes the records, once the manifests have what they say."""
    (out / _FOLDER).remove_tree()


def _record(target: StorePath, out: StorePath) -> StorePath:
    name = "-".join(target.parts[len(out.parts) :])
    return out / _FOLDER / f"{name}.json"
