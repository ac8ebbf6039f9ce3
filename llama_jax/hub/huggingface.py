"""Models and adapters in repositories on the Hugging Face Hub, if `huggingface_hub` is installed.

That library handles downloads, cache, resuming and access tokens; this module selects the files.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama_jax.errors import CheckpointError

_NAME_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_REPOSITORY = re.compile(
    rf"(?P<repo>{_NAME_PART}/{_NAME_PART})(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+\.gguf))?"
)
_INSTALL_HINT = "pip install 'llama-jax[hub]'"
# Configuration and tokenizer files, beside the weights.
_METADATA = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|params)\.json"
    r"|tokenizer\.model|chat_template\.(json|jinja)|additional_chat_templates/tool_use\.jinja"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)
_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_TORCH = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_META = re.compile(r"consolidated\.\d+\.pth")
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin", "adapter.safetensors")


class _Selection(NamedTuple):
    """The files to download, and the path of the model in the repository: a file or a folder."""

    files: Sequence[str]
    model: str


def is_repository(name: str) -> bool:
    """Whether a name has the form OWNER/NAME[@REVISION][:FILE.gguf], and OWNER is not a local directory."""
    match = _REPOSITORY.fullmatch(name)
    return match is not None and not Path(name.partition("/")[0]).is_dir()


def fetch(name: str) -> Path:
    """Downloads a model, or finds it in the Hub's cache, and returns its path.

    Args:
      name: OWNER/NAME, then @REVISION (a branch, tag or commit; main by default), then :FILE.gguf if the
        repository has several.

    Raises:
      CheckpointError: if `huggingface_hub` is missing, or the repository cannot be read or has no weights in
        a supported format.
    """
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        raise CheckpointError(
            f"{name!r} is not a local path; to load it from the Hub: {_INSTALL_HINT}"
        ) from None
    match = _REPOSITORY.fullmatch(name)
    assert match is not None, "call is_repository first"
    repo, revision = match["repo"], match["revision"]
    info = _call(name, lambda: hub.HfApi().model_info(repo, revision=revision, timeout=10))
    if info is None:  # the Hub cannot be reached: use the cache
        folder = _call(name, lambda: hub.snapshot_download(repo, revision=revision, local_files_only=True))
        if folder is None:
            raise CheckpointError(
                f"{name!r} is not a local path, and the Hub cannot be reached; try again later"
            )
        cached = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
        return Path(folder) / _select(name, list(cached), match["file"]).model
    selection = _select(name, [file.rfilename for file in info.siblings or ()], match["file"])
    folder = _call(
        name, lambda: hub.snapshot_download(repo, revision=revision, allow_patterns=list(selection.files))
    )
    if folder is None:
        raise CheckpointError(f"{name!r}: the connection to the Hub was lost; run the same command to resume")
    return Path(folder) / selection.model


def _call(name: str, call: Callable[[], Any]) -> Any:
    """Calls the library; returns None if there is no connection, and converts other errors to one line."""
    errors: Any = importlib.import_module("huggingface_hub.errors")
    try:
        return call()
    except errors.GatedRepoError:
        reason = "access is gated; accept the conditions on its page, then log in with: hf auth login"
    except errors.RevisionNotFoundError:
        reason = "the revision does not exist; check the branch, tag or commit"
    except errors.RepositoryNotFoundError:
        reason = "neither a local path nor a readable repository; if it is private: hf auth login"
    except errors.HFValidationError as error:
        reason = " ".join(str(error).split())[:200]
    except errors.LocalEntryNotFoundError as error:
        return getattr(error, "snapshot_path", None)  # an incomplete snapshot may have the files we need
    except errors.HfHubHTTPError as error:
        reason = " ".join(str(error).split())[:200]
    except OSError as error:
        if not error.errno:  # a connection error
            return None
        reason = f"cannot be stored: {error.strerror}; free some space, or set HF_HOME"
    except Exception as error:  # transport errors have no common importable base
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        return None
    raise CheckpointError(f"{name!r}: {reason}")


def _select(name: str, files: Iterable[str], gguf_file: str | None) -> _Selection:
    """Selects one format of the model among the files of a repository."""
    files = sorted(files)
    parts: dict[str, list[str]] = {}  # a split model's, by its first
    for file in files:
        if file.endswith(".gguf"):
            parts.setdefault(_SPLIT.sub(r"-00001-of-\1.gguf", file), []).append(file)
    ggufs = list(parts)
    if gguf_file is not None:
        first = _SPLIT.sub(r"-00001-of-\1.gguf", gguf_file)
        if first not in ggufs:
            raise CheckpointError(
                f"{name!r}: there is no such file; the GGUF files are: {', '.join(ggufs) or 'none'}"
            )
        return _Selection(parts[first], first)
    for folder, weights in (("", _SAFETENSORS), ("", _TORCH), ("", _META), ("original/", _META)):
        names = {file.removeprefix(folder): file for file in files if file.startswith(folder)}
        shards = [file for base, file in names.items() if weights.fullmatch(base)]
        config = "params.json" if weights is _META else "config.json"
        if shards and config in names:
            metadata = [file for base, file in names.items() if _METADATA.fullmatch(base)]
            return _Selection([*metadata, *shards], folder)
    if _ADAPTER_CONFIG in files and (weights_file := next((file for file in _ADAPTER if file in files), "")):
        metadata = [file for file in files if _METADATA.fullmatch(file)]
        return _Selection([_ADAPTER_CONFIG, *metadata, weights_file], "")
    if len(ggufs) == 1:
        return _Selection(parts[ggufs[0]], ggufs[0])
    if ggufs:
        listed = ", ".join(ggufs[:8])
        raise CheckpointError(f"{name!r} has several GGUF files: {listed}; name one: {name}:{ggufs[0]}")
    raise CheckpointError(
        f"{name!r} has no weights in a supported format; it needs safetensors or pytorch_model.bin with "
        "config.json, Meta's consolidated.*.pth with params.json, or GGUF"
    )
