"""Resolves, downloads and loads models with progress bars."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llama_jax.console.terminal import note, progress_bar, warnings_as_notes
from llama_jax.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from llama_jax.ops.quantization import Bits
    from llama_jax.text.model import Model


def resolve(name_or_path: str) -> Path:
    """Returns a model's path; downloads a known model with a progress bar."""
    from llama_jax.text import pretrained

    title = f"downloading {name_or_path}"
    with progress_bar(title, fallback=f"{title} (once) ...") as progress:
        return pretrained.resolve(name_or_path, progress)


def load(
    name_or_path: str,
    dtype: str,
    bits: Bits | None = None,
    adapter: str | None = None,
    tokenizer: str | None = None,
    mesh: str | None = None,
) -> Model:
    """Loads a model with progress bars; see `llama_jax.load` and, for `mesh`, `meshes.make_mesh`."""
    from llama_jax.text import pretrained

    init_jax()
    devices = None if mesh is None else _mesh(mesh)
    path = resolve(name_or_path)
    with warnings_as_notes(), progress_bar("loading weights") as progress:
        return pretrained.load(
            path,
            dtype,
            devices,
            adapter=adapter,
            tokenizer=tokenizer,
            bits=bits,
            scan_layers=False,
            progress=progress,
        )


def _mesh(spec: str) -> Mesh:
    import jax

    from llama_jax.meshes import make_mesh

    mesh = make_mesh(spec)
    if jax.__version_info__ < (0, 11) and mesh.size > 1 and mesh.devices.flat[0].platform == "cpu":
        # JAX 0.10 ends the process when it reads a kept program of several CPU devices.
        jax.config.update("jax_enable_compilation_cache", False)
    return mesh


def init_jax() -> None:
    """Initializes JAX's backend and enables the persistent compilation cache.

    Raises:
      InputError: if JAX finds no device.
    """
    import jax

    from llama_jax.console.compilation_cache import enable_compilation_cache

    platforms = os.environ.get("JAX_PLATFORMS", "")
    with warnings_as_notes(), _plugin_failures() as failures:
        try:
            jax.devices()
        except (RuntimeError, AssertionError) as error:  # AssertionError: a platform that is not installed
            reason = str(error)[:200] or "; ".join(failures)[:200].rstrip(".?") or "it has no device"
            raise InputError(
                f"JAX cannot use the platform {platforms!r}: {reason}; set JAX_PLATFORMS=cpu, or install JAX "
                "for the device"
            ) from None
    if not platforms:
        for failure in failures:
            note(f"warning: a plugin of JAX does not start: {failure}")
    enable_compilation_cache()


@contextlib.contextmanager
def _plugin_failures() -> Iterator[list[str]]:
    """Collects why plugins of JAX do not start, a line each, in place of the tracebacks that JAX logs."""
    failures: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        failures.append(" ".join(str(error).split()))
        return False

    logger = logging.getLogger("jax._src.xla_bridge")  # private: tests/test_private_seams.py
    logger.addFilter(keep)
    try:
        yield failures
    finally:
        logger.removeFilter(keep)
