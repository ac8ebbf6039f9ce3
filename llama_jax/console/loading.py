"""Models for the verbs: found, fetched and loaded with progress bars."""

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
    """Returns a model's path, fetching a known one with a progress bar."""
    from llama_jax.text import pretrained

    what = f"fetching {name_or_path}"
    with progress_bar(what, otherwise=f"{what} (once) ...") as progress:
        return pretrained.resolve(name_or_path, progress)


def load(name_or_path: str, dtype: str, bits: Bits | None = None, adapter: str | None = None) -> Model:
    """Loads a model with progress bars."""
    from llama_jax.text import pretrained

    start_jax()
    path = resolve(name_or_path)
    with warnings_as_notes(), progress_bar("loading weights") as progress:
        return pretrained.load(path, dtype, adapter=adapter, bits=bits, scan_layers=False, progress=progress)


def start_jax() -> None:
    """Has JAX find its devices, and keep what it compiles.

    Raises:
      InputError: if it finds none.
    """
    import jax

    from llama_jax.console.compilation_cache import keep_compiled_programs

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where the platform is known but not here
        platforms = os.environ.get("JAX_PLATFORMS", "")
        raise InputError(
            f"JAX cannot use the platform {platforms!r}: {str(error)[:200] or 'there is none'}; set "
            "JAX_PLATFORMS=cpu, or install JAX for the device"
        ) from None
    keep_compiled_programs()
