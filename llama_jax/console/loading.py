"""Resolves, downloads and loads models with progress bars."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.console.terminal import progress_bar, warnings_as_notes
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from llama_jax.ops.quantization import Bits
    from llama_jax.text.model import Model


def resolve(name_or_path: str) -> Path:
    """Returns a model's path; downloads a known model with a progress bar."""
    from llama_jax.text import pretrained

    title = f"downloading {name_or_path}"
    with progress_bar(title, fallback=f"{title} (once) ...") as progress:
        return pretrained.resolve(name_or_path, progress)


def load(name_or_path: str, dtype: str, bits: Bits | None = None, adapter: str | None = None) -> Model:
    """Loads a model with progress bars; see `llama_jax.load`."""
    from llama_jax.text import pretrained

    init_jax()
    path = resolve(name_or_path)
    with warnings_as_notes(), progress_bar("loading weights") as progress:
        return pretrained.load(path, dtype, adapter=adapter, bits=bits, scan_layers=False, progress=progress)


def init_jax() -> None:
    """Initializes JAX's backend and enables the persistent compilation cache.

    Raises:
      InputError: if JAX finds no device.
    """
    import jax

    from llama_jax.console.compilation_cache import enable_compilation_cache

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a known platform that is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(
            f"JAX cannot use the platform {platforms!r}: {str(error)[:200] or 'it has no device'}; set "
            "JAX_PLATFORMS=cpu, or install JAX for the device"
        ) from None
    enable_compilation_cache()
