"""The run's tokenizer: copied into its directory at the start, read from there ever after."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from llama_jax import pretrained
from llama_jax.errors import ConfigError, InputError
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.train import train_sentencepiece
from train.config import RunConfig
from train.data import train_texts

# In a folder, the first of these is its tokenizer.
_NAMES = ("tokenizer.json", "tokenizer.model")
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")  # that say what ids mean


def run_tokenizer(run: RunConfig, run_dir: Path) -> Tokenizer:
    """Loads the run's tokenizer, having put it into `run_dir` first where it is not there yet.

    It is copied from `tokenizer.path`, taken from `model.init_from`, or trained on the run's own text. Only
    the first of several processes writes.

    Raises:
      TokenizerError, InputError, DataError: if there is none, or none can be made.
    """
    if not _here(run_dir) and jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        if run.tokenizer.path:
            _copy(pretrained.resolve(run.tokenizer.path), run_dir)
        else:
            train_sentencepiece(
                train_texts(run.data),
                run_dir / "tokenizer.model",
                vocab_size=run.tokenizer.vocab_size,
                max_bytes=run.tokenizer.max_bytes,
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("llama_jax: tokenizer written")
    tokenizer = load_tokenizer(run_dir)
    if run.tokenizer.path and tokenizer.vocab_size != load_tokenizer(_file(run.tokenizer.path)).vocab_size:
        raise ConfigError(
            f"tokenizer.path is {run.tokenizer.path!r}, and the run in {run_dir} began with another one "
            f"({tokenizer.vocab_size} tokens); give that one, or another train.run_dir"
        )
    return tokenizer


def _here(run_dir: Path) -> bool:
    return any((run_dir / name).exists() for name in (*_NAMES, "tokenizer.gguf"))


def _file(name_or_path: str) -> Path:
    path = pretrained.resolve(name_or_path)
    if path.is_dir():
        path = next((path / name for name in _NAMES if (path / name).is_file()), path)
    return path


def _copy(source: Path, run_dir: Path) -> None:
    file = _file(str(source))
    load_tokenizer(file)  # whatever is wrong with it is said before anything is copied
    if file.is_dir():
        raise InputError(f"{file} has no {' or '.join(_NAMES)}; give tokenizer.path the path of one")
    if file.suffix == ".gguf":  # a whole model: linked, not copied
        (run_dir / "tokenizer.gguf").symlink_to(file.absolute())
        return
    if file.suffix not in (".json", ".model"):
        raise InputError(f"tokenizer.path is {file}; a run takes a tokenizer.json, a .model or a .gguf")
    for name in _BESIDE:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, run_dir / name)
    whole = run_dir / f"tokenizer{file.suffix}"
    partial = run_dir / f".tokenizer{file.suffix}.partial"
    shutil.copyfile(file, partial)
    partial.replace(whole)
