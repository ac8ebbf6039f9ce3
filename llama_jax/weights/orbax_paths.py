"""Folders in object stores as Orbax takes them.

Orbax reads and writes small files through `etils.epath`, and arrays through TensorStore, whose s3 driver it
does not use yet: the three private functions that choose a driver are replaced, once, when a store is first
used.
"""

from __future__ import annotations

import functools
import importlib
import posixpath
from pathlib import Path
from typing import Any

from llama_jax.storage import StorePath, as_path
from llama_jax.storage.client import client
from llama_jax.storage.tensorstore_spec import kvstore


def orbax_path(folder: Path) -> Any:
    """Returns a folder as Orbax's functions take it: absolute, and an `epath.Path` of a store.

    Raises:
      StoreError: if the package for the store is not installed.
    """
    if not isinstance(folder, StorePath):
        return folder.absolute()
    client(folder.scheme)  # its package, or the error that names it
    _enable_stores()
    return importlib.import_module("etils.epath").Path(str(folder))


@functools.cache
def _enable_stores() -> None:
    from orbax.checkpoint._src.path import gcs_utils
    from orbax.checkpoint._src.serialization import tensorstore_utils as utils

    # epath's clients would remember listings that TensorStore's writes make wrong.
    conf = importlib.import_module("fsspec.config").conf
    for protocol in ("gs", "gcs", "s3", "s3a"):
        conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)

    def spec(path: str) -> Any:
        found = kvstore(as_path(path))
        return {**found, "path": found["path"].removesuffix("/")} if isinstance(found, dict) else found

    def normalize(path: str) -> str:
        scheme, found, rest = path.partition("://")
        return f"{scheme}://{posixpath.normpath(rest)}" if found else posixpath.normpath(path)

    # private: tests/test_private_seams.py
    utils._normalize_path = normalize
    utils._use_gcs_driver = lambda directory: directory.startswith(("gs://", "s3://"))
    gcs_utils.get_kvstore_for_gcs = spec
