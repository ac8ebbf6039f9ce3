"""The run's tokenizer: copied into its directory at the start, read from there ever after."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from llama_jax.errors import ConfigError, InputError, TokenizerError
from llama_jax.text import pretrained
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.train import train_sentencepiece
from llama_jax.weights import open_source

from .config.run import RunConfig
from .data import train_texts
from .data.encode import Encoder

# In a folder, the first of these is its tokenizer.
_NAMES = ("tokenizer.json", "tokenizer.model")
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json")  # that say what ids mean
_SUFFIXES = (".json", ".model", ".bin", ".gguf")


def run_tokenizer(run: RunConfig, run_dir: Path) -> Tokenizer:
    """Loads the run's tokenizer, having put it into `run_dir` first where it is not there yet.

    It is copied from `tokenizer.path`, else from beside `model.init_from`, else trained on the run's own
    text. Only the first of several processes writes.

    Raises:
      TokenizerError, InputError, DataError: if there is none, or none can be made.
      ConfigError: if it does not fit `model.init_from`, or `run_dir` has another one.
    """
    file = _file(run.tokenizer.path, run.model.init_from)
    given = None if file is None else load_tokenizer(file)
    if given is not None and run.model.init_from:
        _check_fit(given, run.model.init_from)
    here = any((run_dir / f"tokenizer{suffix}").exists() for suffix in _SUFFIXES)
    if not here and jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        if file is not None:
            _copy(file, run_dir)
        else:
            _learn(run, run_dir / "tokenizer.model")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("llama_jax: tokenizer written")
    tokenizer = load_tokenizer(run_dir)
    if given is None:
        asked = f"vocab_size {run.tokenizer.vocab_size}"
        same = tokenizer.vocab_size == run.tokenizer.vocab_size
    else:
        asked = f"path {str(file)!r}"
        same = Encoder(tokenizer).fingerprint == Encoder(given).fingerprint
    if not same:
        raise ConfigError(
            f"tokenizer.{asked} is not what {run_dir} was begun with, a vocabulary of {tokenizer.vocab_size} "
            "tokens; give that one, or another train.run_dir"
        )
    return tokenizer


def _file(path: str, init_from: str) -> Path | None:
    """The file of the vocabulary that is given, by itself or with a model; None if one is to be trained."""
    if not path and not init_from:
        return None
    folder = pretrained.resolve(path or init_from)
    if not path:
        folder = open_source(folder).home or folder
    if folder.is_file() and folder.suffix == ".bin" and not folder.name.startswith("tok"):
        folder = folder.parent  # a llama2.c model: its vocabulary lies beside it
    if folder.is_file():
        if folder.suffix not in _SUFFIXES:
            raise InputError(f"tokenizer.path is {folder}; a run takes a {', '.join(_SUFFIXES)} file")
        return folder
    found = [folder / name for name in _NAMES if (folder / name).is_file()]
    found = found[:1] or sorted(folder.glob("tok*.bin"))
    if len(found) != 1:
        raise InputError(
            f"{folder} has no {' or '.join(_NAMES)}, nor one tok*.bin; give tokenizer.path the path of one"
        )
    return found[0]


def _check_fit(tokenizer: Tokenizer, init_from: str) -> None:
    needed = open_source(pretrained.resolve(init_from)).config.vocab_size
    if tokenizer.vocab_size != needed:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and model.init_from {init_from!r} was trained "
            f"with {needed}; set tokenizer.path to the one that came with it"
        )


def _learn(run: RunConfig, out: Path) -> None:
    sizes = run.tokenizer
    try:
        train_sentencepiece(
            train_texts(run.data), out, vocab_size=sizes.vocab_size, max_bytes=sizes.max_bytes
        )
    except TokenizerError as error:
        files = ", ".join(repr(source.files) for source in run.data.sources)
        raise TokenizerError(f"no tokenizer of {files}: {error}") from None


def _copy(file: Path, run_dir: Path) -> None:
    whole = run_dir / f"tokenizer{file.suffix}"
    if file.suffix == ".gguf":  # a whole model: linked, not copied
        whole.symlink_to(file.absolute())
        return
    for name in _BESIDE:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, run_dir / name)
    partial = run_dir / f".tokenizer{file.suffix}.partial"
    shutil.copyfile(file, partial)
    partial.replace(whole)
