"""Detects the format of a checkpoint from its contents, and opens it."""

from __future__ import annotations

from pathlib import Path

from llama_jax.errors import CheckpointError
from llama_jax.storage import as_path
from llama_jax.weights.gguf import open_gguf
from llama_jax.weights.gguf_header import MAGIC
from llama_jax.weights.gguf_split import first_part
from llama_jax.weights.hf import open_hf
from llama_jax.weights.llama2c import is_llama2c, open_llama2c
from llama_jax.weights.meta import is_meta, open_meta
from llama_jax.weights.orbax import is_orbax, open_orbax, open_run
from llama_jax.weights.runs import is_run
from llama_jax.weights.source import Source, format_list, open_file, os_error_reason

_SUPPORTED_FORMATS = (
    "a GGUF file, a Hugging Face directory with config.json and .safetensors files, a Meta directory with "
    "params.json and consolidated.*.pth, a training run's directory, or a llama2.c .bin"
)


def open_source(path: str | Path) -> Source:
    """Opens a checkpoint: reads and checks its headers, and no tensor data.

    Args:
      path: a GGUF file, a Hugging Face or Meta directory, the directory of a training run (its newest intact
        checkpoint is used) or of one checkpoint, a llama2.c `.bin`, or a directory with exactly one such
        file. The format is detected from the contents, not from the name; see `Source.detected_by`.

    Raises:
      CheckpointError: if the path does not exist, the format is unknown, the headers are malformed, or
        llama_jax does not support the model.
    """
    try:
        path = as_path(path).expanduser()
        if path.is_dir():
            return _open_directory(path)
        with open_file(path) as (file, _):
            start = file.read(8)
        if start.startswith(MAGIC):
            return open_gguf(path, f"the file begins with {MAGIC.decode()}")
        if is_meta(path):
            return open_meta(path, "the file is a shard of a Meta checkpoint")
        if is_llama2c(path):
            return open_llama2c(path, "the file begins with a llama2.c header")
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {os_error_reason(error)}; check its permissions"
        ) from error
    except RuntimeError as error:  # `expanduser` for an unknown user
        raise CheckpointError(f"{path}: {error}; give the absolute path") from None
    raise CheckpointError(f"{path}: {_describe_unsupported(path, start)}; give {_SUPPORTED_FORMATS}")


def _open_directory(path: Path) -> Source:
    if is_orbax(path):
        return open_orbax(path, "the directory has Orbax's _METADATA")
    if is_run(path):
        return open_run(path)
    if (path / "config.json").exists():
        return open_hf(path, "the directory has a config.json")
    if is_meta(path):
        return open_meta(path, "the directory has params.json and consolidated.*.pth")
    models = sorted({_first_present(entry) for entry in path.iterdir() if _is_model_file(entry)})
    if len(models) == 1:
        return open_source(models[0])
    if models:
        names = format_list([entry.name for entry in models], 8)
        raise CheckpointError(f"{path}: the directory has several models ({names}); give the path of one")
    raise CheckpointError(f"{path}: the directory holds no model; give {_SUPPORTED_FORMATS}")


def _is_model_file(path: Path) -> bool:
    """Whether a file name is that of a single-file model, and not of a llama2.c tokenizer."""
    named = path.suffix == ".gguf" or (path.suffix == ".bin" and not path.name.startswith("tok"))
    return named and path.is_file()


def _first_present(path: Path) -> Path:
    """Returns the first part of a split model in place of the others."""
    first = first_part(path)
    return first if first.is_file() else path


def _describe_unsupported(path: Path, start: bytes) -> str:
    """Describes a file that cannot be opened, from its name and first bytes."""
    if path.suffix == ".safetensors":
        return "one file of a Hugging Face directory: give the directory"
    if start.startswith((b"PK", b"\x80")):
        return "a PyTorch file that is not a shard of a Meta checkpoint (params.json and consolidated.*.pth)"
    if start[:4] in (b"tjgg", b"lmgg", b"fmgg"):
        return "a GGML file older than GGUF; convert it with llama.cpp"
    return "the file is empty" if not start else "unknown format"
