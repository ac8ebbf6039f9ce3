"""JAX's persistent compilation cache, so that only the first run of a program waits for XLA."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

from llama_jax.errors import CheckpointError
from llama_jax.storage.cache import cache_folder


def enable_compilation_cache() -> None:
    """Stores JAX's persistent compilation cache in our cache directory, unless the user has set another.

    Each CPU type has its own subdirectory: a program compiled for one CPU may contain instructions that
    another lacks, and a home directory may be shared between machines.
    """
    # If the cache cannot be written or read, JAX only compiles again: not worth a warning.
    warnings.filterwarnings("ignore", ".*persistent compilation cache")
    with contextlib.suppress(CheckpointError):
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled" / _cpu_type()))


def _cpu_type() -> str:
    """Returns a hash of the operating system, the CPU model and its instruction sets."""
    try:  # the first processor's entry
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        lines = [line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))]
    except OSError:
        lines = [platform.processor()]
    name = "\n".join([platform.system(), platform.machine(), *lines])
    return hashlib.sha256(name.encode()).hexdigest()[:16]
