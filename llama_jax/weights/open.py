"""Decides which format a path holds, by looking at it, and opens it."""

from __future__ import annotations

from pathlib import Path

from llama_jax.errors import CheckpointError
from llama_jax.weights.gguf import open_gguf
from llama_jax.weights.gguf_header import MAGIC
from llama_jax.weights.hf import open_hf
from llama_jax.weights.llama2c import is_llama2c, open_llama2c
from llama_jax.weights.meta import is_meta, open_meta
from llama_jax.weights.orbax import is_orbax, open_orbax, open_run
from llama_jax.weights.runs import is_run
from llama_jax.weights.source import Source, brief, open_file, reason

_READABLE = (
    "a GGUF file, a Hugging Face directory with config.json and .safetensors files, a Meta directory with "
    "params.json and consolidated.*.pth, a training run's directory, or a llama2.c .bin"
)


def open_source(path: str | Path) -> Source:
    """Opens a checkpoint: reads and checks its headers, and none of its tensors.

    Args:
      path: a GGUF file, a Hugging Face or Meta directory, the directory of a training run (its newest whole
        checkpoint is taken) or of one checkpoint, or a llama2.c `.bin`; or a directory with one such file.
        What it holds decides, not its name; `Source.why` says how.

    Raises:
      CheckpointError: if nothing is there, the format is unknown, or the headers are malformed or
        describe a model that llama_jax does not run.
    """
    path = Path(path)
    try:
        path = path.expanduser()
        if path.is_dir():
            return _open_directory(path)
        with open_file(path) as (file, _):
            start = file.read(8)
        if start.startswith(MAGIC):
            return open_gguf(path, f"the file begins with {MAGIC.decode()}")
        if is_meta(path):
            return open_meta(path, "the file is one of the parts of a Meta checkpoint")
        if is_llama2c(path):
            return open_llama2c(path, "the file begins with a llama2.c header")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}; check its permissions") from error
    except RuntimeError as error:  # no such user's home
        raise CheckpointError(f"{path}: {error}; give the whole path") from None
    raise CheckpointError(f"{path}: {_what_else(path, start)}; give {_READABLE}")


def _open_directory(path: Path) -> Source:
    if is_orbax(path):
        return open_orbax(path, "the directory holds Orbax's _METADATA")
    if is_run(path):
        return open_run(path)
    if (path / "config.json").exists():
        return open_hf(path, "the directory has a config.json")
    if is_meta(path):
        return open_meta(path, "the directory has params.json and consolidated.*.pth")
    models = sorted(entry for entry in path.iterdir() if _may_be_model(entry))
    if len(models) == 1:
        return open_source(models[0])
    if models:
        names = brief([entry.name for entry in models], 8)
        raise CheckpointError(f"{path}: a directory of several models ({names}); give the path of one")
    raise CheckpointError(f"{path}: a directory that holds no model; give {_READABLE}")


def _may_be_model(path: Path) -> bool:
    """Whether a file has the name of a whole model, and not of a vocabulary."""
    named = path.suffix == ".gguf" or (path.suffix == ".bin" and not path.name.startswith("tok"))
    return named and path.is_file()


def _what_else(path: Path, start: bytes) -> str:
    """Says what a file is that cannot be opened, where its beginning tells."""
    if path.suffix == ".safetensors":
        return "one file of a Hugging Face directory: give the directory"
    if start.startswith((b"PK", b"\x80")):
        return "a PyTorch file that is no part of a Meta checkpoint (params.json and consolidated.*.pth)"
    if start[:4] in (b"tjgg", b"lmgg", b"fmgg"):
        return "a file from before GGUF, which llama.cpp can convert"
    return "empty" if not start else "no format that can be read"
