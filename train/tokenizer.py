"""The run's tokenizer: copied into its directory at the start, and loaded from there."""

from __future__ import annotations

import json
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from llama_jax.errors import CheckpointError, ConfigError, InputError, TokenizerError
from llama_jax.storage import as_path
from llama_jax.storage.atomic import atomic_file
from llama_jax.text import pretrained
from llama_jax.tokenizer import Tokenizer, load_tokenizer
from llama_jax.tokenizer.fit import fit_vocabulary
from llama_jax.tokenizer.hf_config import TOOL_USE
from llama_jax.tokenizer.train import train_sentencepiece
from llama_jax.weights import open_source
from llama_jax.weights.gguf_header import without_tensors
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.runs import StepMetadata

from .config.run import RunConfig
from .data import train_texts
from .data.encode import Encoder
from .provenance import is_as_started

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # in a directory, in order of preference
_GENERATION_CONFIG = "generation_config.json"
# Copied along: special and added tokens, end tokens, the chat template.
_CONFIG_FILES: tuple[str, ...] = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_CONFIG_FILES += ("chat_template.jinja", _GENERATION_CONFIG)
_SUFFIXES = (".json", ".model", ".bin", ".gguf")
TOKENIZER_FILES = (*(f"tokenizer{suffix}" for suffix in _SUFFIXES), *_CONFIG_FILES)  # in a run's directory


def run_tokenizer(run: RunConfig, run_dir: Path, started: StepMetadata | None = None) -> Tokenizer:
    """Loads the run's tokenizer; at the start of a run, first copies it into `run_dir` or trains it there.

    It is copied from `tokenizer.path`, else from `model.init_from`, else trained on the run's own text. A run
    that has a checkpoint reads its copy, and the original need not be there any more. Only process 0 writes.

    Raises:
      TokenizerError, InputError, DataError: if there is none, or it cannot be trained.
      ConfigError: if it does not fit `model.init_from`, or `run_dir` has a different one.
    """
    has_own = any((run_dir / f"tokenizer{suffix}").exists() for suffix in _SUFFIXES)
    begun = started is not None and has_own
    file = None if begun and not _may_differ(run, started) else _find_file(run)
    configured = None if file is None else load_tokenizer(file)
    if configured is not None and run.model.init_from:
        _check_vocabulary(configured, run)
    if not begun and jax.process_index() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        if file is not None:
            _copy(file, run_dir)
        else:
            remove_tokenizer(run_dir)
            _train(run, run_dir / "tokenizer.model")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("llama_jax: tokenizer written")
    tokenizer = load_tokenizer(run_dir)
    if configured is not None:
        setting = f"path {str(file)!r}"
        is_same = Encoder(tokenizer).fingerprint == Encoder(configured).fingerprint
    else:
        setting = f"vocab_size {run.tokenizer.vocab_size}"
        trained = not run.tokenizer.path and not run.model.init_from
        is_same = not trained or tokenizer.vocab_size == run.tokenizer.vocab_size
    if not is_same:
        raise ConfigError(
            f"tokenizer.{setting} is not the tokenizer that {run_dir} was started with, which has "
            f"{tokenizer.vocab_size} tokens; use that one, or choose another train.run_dir"
        )
    return tokenizer


def remove_tokenizer(run_dir: Path) -> None:
    """Removes the tokenizer's files from a run's directory."""
    for name in TOKENIZER_FILES:
        (run_dir / name).unlink(missing_ok=True)


def _may_differ(run: RunConfig, started: StepMetadata | None) -> bool:
    """Whether the configured tokenizer has to be compared with the one that a run was started with.

    One that was trained is compared by its size; the original of one that was copied if it is still there.
    """
    if not run.tokenizer.path:
        return bool(run.model.init_from) and not is_as_started(run, started, "model.init_from")
    unchanged = is_as_started(run, started, "tokenizer.path")
    return not unchanged or as_path(run.tokenizer.path).expanduser().exists()


def _find_file(run: RunConfig) -> Path | None:
    """The configured tokenizer file, or the pretrained model's; None if one is to be trained."""
    path, init_from = run.tokenizer.path, run.model.init_from
    if not path and not init_from:
        return None
    try:
        source = pretrained.resolve(path or init_from)
        if not path:
            source = _tokenizer_place(run)
    except CheckpointError as error:
        setting = "tokenizer.path" if path else "model.init_from"
        hint = "; or set tokenizer.vocab_size instead, to train one on the run's text"
        raise InputError(f"{setting}: {error}{hint if path and not init_from else ''}") from None
    if source.is_file() and source.suffix == ".bin" and not source.name.startswith("tok"):
        source = source.parent  # a llama2.c model: its tokenizer is in the same directory
    if source.is_file():
        if source.suffix not in _SUFFIXES:
            raise InputError(f"tokenizer.path is {source}; it must be a {', '.join(_SUFFIXES)} file")
        return source
    found = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    found = found[:1] or sorted(source.glob("tok*.bin")) or sorted(source.glob("tokenizer.gguf"))
    if len(found) != 1:
        raise InputError(
            f"{source} has no {' or '.join(_TOKENIZER_FILES)}, nor a single tok*.bin; set tokenizer.path to "
            "a tokenizer file"
        )
    return found[0]


def _tokenizer_place(run: RunConfig) -> Path:
    """The file or directory with the tokenizer of `model.init_from`."""
    source = open_source(pretrained.resolve(run.model.init_from))
    return source.tokenizer_dir or source.path


def _check_vocabulary(tokenizer: Tokenizer, run: RunConfig) -> None:
    """Checks that a tokenizer fits the embedding of `model.init_from`, which may have more rows.

    Raises:
      ConfigError: if it has tokens that the embedding has no rows for, other than added ones; or if it is not
        the model's own tokenizer, and has another size.
    """
    init_from = run.model.init_from
    vocab_size = pretrained.open_model(init_from).config.vocab_size
    try:
        fit_vocabulary(tokenizer, vocab_size)
        fits = tokenizer.vocab_size == vocab_size or not run.tokenizer.path or _is_own(tokenizer, run)
    except TokenizerError:
        fits = False
    if not fits:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and model.init_from {init_from!r} was trained "
            f"with {vocab_size}; set tokenizer.path to the model's own tokenizer"
        )


def _is_own(tokenizer: Tokenizer, run: RunConfig) -> bool:
    """Whether a tokenizer agrees with the one of `model.init_from`, or that has none."""
    try:
        own = load_tokenizer(_tokenizer_place(run))
    except TokenizerError:
        return True
    shared = range(min(own.vocab_size, tokenizer.vocab_size))
    return all(own.piece(token) == tokenizer.piece(token) for token in shared)


def _train(run: RunConfig, out: Path) -> None:
    config = run.tokenizer
    try:
        train_sentencepiece(
            train_texts(run.data), out, vocab_size=config.vocab_size, max_bytes=config.max_bytes
        )
    except TokenizerError as error:
        files = ", ".join(repr(source.title) for source in run.data.sources)
        raise TokenizerError(f"cannot train a tokenizer on {files}: {error}") from None


def _copy(file: Path, run_dir: Path) -> None:
    """Copies a tokenizer's files, in place of those of an earlier start."""
    if file.parent.resolve() == run_dir.resolve():
        return
    remove_tokenizer(run_dir)
    if file.suffix in (".json", ".model"):
        _copy_config(file, run_dir)
    # A .gguf file contains the weights too.
    content = without_tensors(file) if file.suffix == ".gguf" else file.read_bytes()
    with atomic_file(run_dir / f"tokenizer{file.suffix}") as partial:
        partial.write_bytes(content)


def _copy_config(file: Path, run_dir: Path) -> None:
    """Copies the configuration files next to a tokenizer, and the end tokens of its model's config.json."""
    for name in _CONFIG_FILES:
        if (file.parent / name).is_file():
            (run_dir / name).write_bytes((file.parent / name).read_bytes())
    if (file.parent / TOOL_USE).is_file():  # one template has both
        (run_dir / "chat_template.jinja").write_text(load_tokenizer(file).chat_template or "")
    if (config := file.parent / "config.json").is_file():
        own = run_dir / _GENERATION_CONFIG
        ids = {name: read_json(config).get(name) for name in ("bos_token_id", "eos_token_id")}
        found = {name: token for name, token in ids.items() if token is not None}
        generation = read_json(own) if own.is_file() else {}
        own.write_text(json.dumps({**found, **{k: v for k, v in generation.items() if v is not None}}))
