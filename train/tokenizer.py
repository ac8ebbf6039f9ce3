"""The run's tokenizer: copied into its directory at the start, and loaded from there."""

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

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # in a directory, in order of preference
_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")  # copied along: special tokens
_SUFFIXES = (".json", ".model", ".bin", ".gguf")


def run_tokenizer(run: RunConfig, run_dir: Path) -> Tokenizer:
    """Loads the run's tokenizer; at the start of a run, first copies it into `run_dir` or trains it there.

    It is copied from `tokenizer.path`, else from `model.init_from`, else trained on the run's own text. Only
    process 0 writes.

    Raises:
      TokenizerError, InputError, DataError: if there is none, or it cannot be trained.
      ConfigError: if it does not fit `model.init_from`, or `run_dir` has a different one.
    """
    file = _find_file(run.tokenizer.path, run.model.init_from)
    configured = None if file is None else load_tokenizer(file)
    if configured is not None and run.model.init_from:
        _check_vocab_size(configured, run.model.init_from)
    exists = any((run_dir / f"tokenizer{suffix}").exists() for suffix in _SUFFIXES)
    if not exists and jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        if file is not None:
            _copy(file, run_dir)
        else:
            _train(run, run_dir / "tokenizer.model")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("llama_jax: tokenizer written")
    tokenizer = load_tokenizer(run_dir)
    if configured is None:
        setting = f"vocab_size {run.tokenizer.vocab_size}"
        is_same = tokenizer.vocab_size == run.tokenizer.vocab_size
    else:
        setting = f"path {str(file)!r}"
        is_same = Encoder(tokenizer).fingerprint == Encoder(configured).fingerprint
    if not is_same:
        raise ConfigError(
            f"tokenizer.{setting} is not the tokenizer that {run_dir} was started with, which has "
            f"{tokenizer.vocab_size} tokens; use that one, or choose another train.run_dir"
        )
    return tokenizer


def _find_file(path: str, init_from: str) -> Path | None:
    """The configured tokenizer file, or the pretrained model's; None if one is to be trained."""
    if not path and not init_from:
        return None
    source = pretrained.resolve(path or init_from)
    if not path:
        source = open_source(source).tokenizer_dir or source
    if source.is_file() and source.suffix == ".bin" and not source.name.startswith("tok"):
        source = source.parent  # a llama2.c model: its tokenizer is in the same directory
    if source.is_file():
        if source.suffix not in _SUFFIXES:
            raise InputError(f"tokenizer.path is {source}; it must be a {', '.join(_SUFFIXES)} file")
        return source
    found = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    found = found[:1] or sorted(source.glob("tok*.bin"))
    if len(found) != 1:
        raise InputError(
            f"{source} has no {' or '.join(_TOKENIZER_FILES)}, nor a single tok*.bin; set tokenizer.path to "
            "a tokenizer file"
        )
    return found[0]


def _check_vocab_size(tokenizer: Tokenizer, init_from: str) -> None:
    vocab_size = open_source(pretrained.resolve(init_from)).config.vocab_size
    if tokenizer.vocab_size != vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and model.init_from {init_from!r} was trained "
            f"with {vocab_size}; set tokenizer.path to the model's own tokenizer"
        )


def _train(run: RunConfig, out: Path) -> None:
    config = run.tokenizer
    try:
        train_sentencepiece(
            train_texts(run.data), out, vocab_size=config.vocab_size, max_bytes=config.max_bytes
        )
    except TokenizerError as error:
        files = ", ".join(repr(source.files) for source in run.data.sources)
        raise TokenizerError(f"cannot train a tokenizer on {files}: {error}") from None


def _copy(file: Path, run_dir: Path) -> None:
    target = run_dir / f"tokenizer{file.suffix}"
    if file.suffix == ".gguf":  # contains the weights too: linked, not copied
        target.symlink_to(file.absolute())
        return
    for name in _CONFIG_FILES:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, run_dir / name)
    partial = run_dir / f".tokenizer{file.suffix}.partial"
    shutil.copyfile(file, partial)
    partial.replace(target)
