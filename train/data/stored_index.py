"""Where an index is: beside its files; of files in a store also in the cache, where it can be mapped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from llama_jax.errors import StoreError
from llama_jax.storage import StorePath, as_path, is_address, upload
from llama_jax.storage.atomic import atomic_file
from llama_jax.storage.cache import cache_folder

from .files import INDEX_FOLDER, File, common_folder
from .pieces import Kind


def fetch_index(stored: Path, local: Path) -> None:
    """Copies the index that another machine has made into the cache, unless a newer one is there.

    Args:
      stored: where it would be beside the files.
      local: where it is used.
    """
    if not isinstance(stored, StorePath) or not stored.is_file():
        return
    if local.exists() and local.stat().st_mtime >= stored.info().modified:
        return
    # If it cannot be copied, it is made again.
    with (
        contextlib.suppress(OSError),
        atomic_file(local) as partial,
        stored.open("rb") as opened,
        partial.open("wb") as out,
    ):
        shutil.copyfileobj(opened, out, 1 << 20)


def offer_index(local: Path, stored: Path) -> None:
    """Copies an index that was made here beside its files, unless this account may not write there."""
    if isinstance(stored, StorePath):
        with contextlib.suppress(StoreError, OSError):
            upload(local, stored)


def index_paths(files: Sequence[File], version: int, kind: Kind) -> tuple[Path | None, list[Path]]:
    """Returns where the index of files is in their store, if they are in one, and where it can be mapped."""

    def name(names: Sequence[str]) -> str:
        described = json.dumps([version, kind, list(names)]).encode()
        return hashlib.blake2b(described, digest_size=12).hexdigest() + ".index"

    cache = cache_folder() / "data"
    if any(is_address(file.path) for file in files):
        cached = cache / name([file.path for file in files])
        common = common_folder({as_path(file.path).parent for file in files})
        return common and common / INDEX_FOLDER / cached.name, [cached]
    paths = [os.path.abspath(file.path) for file in files]  # noqa: PTH100  # resolves no links
    root = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    beside = name([os.path.relpath(path, root) for path in paths])  # also when the folder moves
    return None, [Path(root) / INDEX_FOLDER / beside, cache / name(paths)]
