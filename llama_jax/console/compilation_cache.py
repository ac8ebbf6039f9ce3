"""Keeps compiled programs between runs, so that only the first `generate` of a kind waits for XLA."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import warnings
from pathlib import Path

import jax

from llama_jax.errors import CheckpointError
from llama_jax.hub.known import cache_folder


def keep_compiled_programs() -> None:
    """Points JAX's persistent compilation cache into our cache folder, unless the user has set one.

    A program compiled for one CPU may hold instructions that another lacks, and a home folder may be
    shared by both: each kind of CPU has a folder of its own.
    """
    # Where nothing can be kept, or what was kept cannot be read, compiling again is all that happens.
    warnings.filterwarnings("ignore", ".*persistent compilation cache")
    with contextlib.suppress(CheckpointError):
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled" / _machine()))


def _machine() -> str:
    try:  # the first processor's model and instruction sets
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        lines = [line for line in text.splitlines() if line.startswith(("model name", "flags", "Features"))]
    except OSError:
        lines = [platform.processor()]
    name = "\n".join([platform.system(), platform.machine(), *lines])
    return hashlib.sha256(name.encode()).hexdigest()[:16]
