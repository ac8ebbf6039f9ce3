"""The folder on this machine's disk for what is fetched, converted or on its way to a store."""

from __future__ import annotations

import os
from pathlib import Path

from llama_jax.errors import CheckpointError


def cache_folder() -> Path:
    """Returns $LLAMA_JAX_CACHE, or ~/.cache/llama_jax if it is not set.

    Raises:
      CheckpointError: if it is in the home directory of an unknown user.
    """
    folder = Path(os.environ.get("LLAMA_JAX_CACHE") or "~/.cache/llama_jax")
    try:
        return folder.expanduser().absolute()
    except RuntimeError:
        raise CheckpointError(
            f"the cache directory {folder} is in a home directory that does not exist; "
            "set LLAMA_JAX_CACHE to a writable directory"
        ) from None
