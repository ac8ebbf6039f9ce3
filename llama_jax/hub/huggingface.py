"""Models by the name of their repository on the Hugging Face hub, where its client library is installed.

Downloads, their cache, resuming and tokens are the library's; what is decided here is which files are the
model.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from llama_jax.errors import CheckpointError

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+\.gguf))?")
_EXTRA = "pip install 'llama-jax[hub]'"
# Beside the weights: what describes the model and its tokenizer.
_SMALL = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|params)\.json"
    r"|tokenizer\.model|chat_template\.(json|jinja)|model\.safetensors\.index\.json"
)
_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_META = re.compile(r"consolidated\.\d+\.pth")


class _Choice(NamedTuple):
    """The files to take, and the one, or the folder, among them that is the model."""

    files: Sequence[str]
    model: str


def is_repository(name: str) -> bool:
    """Whether a name is written like a repository's: OWNER/NAME[@REVISION][:FILE.gguf].

    What lies in a folder that is here is a path.
    """
    found = _NAME.fullmatch(name)
    return found is not None and not Path(name.partition("/")[0]).is_dir()


def fetch(name: str) -> Path:
    """Downloads a model, or finds it in the hub's cache, and returns its path.

    Args:
      name: OWNER/NAME, then @REVISION (a branch, tag or commit; main by default), then :FILE.gguf where the
        repository holds several.

    Raises:
      CheckpointError: if the client library is missing, the repository cannot be read, or holds no weights
        that llama_jax reads.
    """
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        raise CheckpointError(f"{name!r} is no file here; to load it from the hub: {_EXTRA}") from None
    found = _NAME.fullmatch(name)
    assert found is not None, "is_repository comes first"
    repo, revision = found["repo"], found["revision"]
    about = _ask(name, lambda: hub.HfApi().model_info(repo, revision=revision, timeout=10))
    if about is None:  # the hub cannot be reached: what the cache has
        folder = _ask(name, lambda: hub.snapshot_download(repo, revision=revision, local_files_only=True))
        if folder is None:
            raise CheckpointError(f"{name!r} is no file here, and the hub cannot be reached; try again later")
        here = (path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())
        return Path(folder) / _choose(name, list(here), found["file"]).model
    choice = _choose(name, [file.rfilename for file in about.siblings or ()], found["file"])
    folder = _ask(
        name, lambda: hub.snapshot_download(repo, revision=revision, allow_patterns=list(choice.files))
    )
    if folder is None:
        raise CheckpointError(f"{name!r}: the hub went away during the download; run the same again to go on")
    return Path(folder) / choice.model


def _ask(name: str, call: Callable[[], Any]) -> Any:
    """Calls the library; None where there is no answer, and one line of whatever else it raises."""
    errors: Any = importlib.import_module("huggingface_hub.errors")
    try:
        return call()
    except errors.GatedRepoError:
        what = "its owner asks for an agreement: accept it on its page, then log in with: hf auth login"
    except errors.RevisionNotFoundError:
        what = "there is no such revision"
    except errors.RepositoryNotFoundError:
        what = "neither a file here nor a repository that can be read; if it is private: hf auth login"
    except errors.HFValidationError as error:
        what = " ".join(str(error).split())[:200]
    except errors.LocalEntryNotFoundError as error:
        return getattr(error, "snapshot_path", None)  # of files that we may not need all
    except errors.HfHubHTTPError as error:
        what = " ".join(str(error).split())[:200]
    except OSError as error:
        if not error.errno:  # a connection's
            return None
        what = f"cannot be stored: {error.strerror}"
    except Exception as error:  # its transport's errors have no base that can be imported
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests", "urllib3")):
            raise
        return None
    raise CheckpointError(f"{name!r}: {what}")


def _choose(name: str, files: Iterable[str], wanted: str | None) -> _Choice:
    """Picks one form of a model out of all that a repository holds."""
    files = sorted(files)
    ggufs = [file for file in files if file.endswith(".gguf")]
    if wanted is not None:
        if wanted not in ggufs:
            raise CheckpointError(f"{name!r}: there is no such file; it has {', '.join(ggufs) or 'no .gguf'}")
        return _Choice([wanted], wanted)
    for folder, weights in (("", _SAFETENSORS), ("", _META), ("original/", _META)):
        inside = [file for file in files if str(PurePosixPath(file).parent) == (folder.rstrip("/") or ".")]
        names = {PurePosixPath(file).name: file for file in inside}
        taken = [file for last, file in names.items() if weights.fullmatch(last)]
        description = "config.json" if weights is _SAFETENSORS else "params.json"
        if taken and description in names:
            small = [file for last, file in names.items() if _SMALL.fullmatch(last)]
            return _Choice([*small, *taken], folder)
    if len(ggufs) == 1:
        return _Choice(ggufs, ggufs[0])
    if ggufs:
        some = ", ".join(ggufs[:8])
        raise CheckpointError(f"{name!r} holds several models: {some}; add the file: {name}:{ggufs[0]}")
    raise CheckpointError(
        f"{name!r} holds no weights that can be read: neither safetensors with config.json, nor Meta's "
        "consolidated.*.pth with params.json, nor GGUF"
    )
