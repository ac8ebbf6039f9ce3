"""Tokenizers: text to token ids and back, from every vocabulary format that Llama models use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from llama_jax.errors import CheckpointError, MissingTokenizerError, TokenizerError
from llama_jax.storage import as_path
from llama_jax.tokenizer import (
    gguf_vocab,
    llama2c_vocab,
    sentencepiece_model,
    tiktoken_file,
    tokenizer_json,
)
from llama_jax.tokenizer.base import StreamDecoder, Tokenizer
from llama_jax.tokenizer.files import read_bytes
from llama_jax.weights import open_source
from llama_jax.weights.gguf_header import MAGIC
from llama_jax.weights.gguf_split import first_part

__all__ = ["StreamDecoder", "Tokenizer", "has_tokenizer", "load_tokenizer"]


def _load_model_file(path: Path) -> Tokenizer:
    """Loads a `tokenizer.model`: a SentencePiece model, or Llama 3's list of ranked pieces."""
    data = read_bytes(path)
    if tiktoken_file.is_tiktoken(data):
        return tiktoken_file.load(path, data)
    return sentencepiece_model.load(path)


_LOADERS: Mapping[str, Callable[[Path], Tokenizer]] = {
    ".json": tokenizer_json.load,
    ".model": _load_model_file,
    ".gguf": gguf_vocab.load,
    ".bin": llama2c_vocab.load,
}
# File names to look for in a directory, the most specific format first.
_PATTERNS = ("tokenizer.json", "tokenizer.model", "tok*.bin", "*.gguf")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: a `tokenizer.json`, a SentencePiece or tiktoken `.model`, a `.gguf`, or a llama2.c `tok*.bin`; a
        directory with one of them (the first in this order); or a llama2.c model `.bin` with one next to it.

    Raises:
      TokenizerError: if there is none, or it cannot be read.
    """
    try:
        path = as_path(path).expanduser()
    except RuntimeError as error:  # unknown ~user
        raise TokenizerError(f"{path}: {error}; give the full path") from None
    try:
        return _load(path)
    except OSError as error:  # no permission on a parent directory, name too long, ...
        raise TokenizerError(
            f"{path} cannot be read ({error.strerror or error}); check its path and permissions"
        ) from None


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory has the tokenizer of a Hugging Face model."""
    return any((directory / name).is_file() for name in _PATTERNS[:2])


def _load(path: Path) -> Tokenizer:
    if path.is_dir():
        return _load_from(path, path)
    if path.suffix == ".bin" and not path.name.startswith("tok"):
        if not path.exists():
            raise TokenizerError(f"{path} does not exist; give the path of a tokenizer file or a model")
        return _load_from(path.parent, path)
    if path.suffix not in _LOADERS and path.is_file():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:  # a GGUF file may have any name
                return gguf_vocab.load(path)
    if path.suffix not in _LOADERS:
        raise TokenizerError(
            f"{path} is not named like a tokenizer file; give a tokenizer.json, a .model, a .gguf, a "
            "tok*.bin, or a directory with one of them"
        )
    return _LOADERS[path.suffix](path)


def _load_from(directory: Path, model: Path) -> Tokenizer:
    """Loads the tokenizer of `model` from `directory`."""
    # A .gguf next to a llama2.c model is another model.
    patterns = _PATTERNS[:-1] if model.suffix == ".bin" and model.is_file() else _PATTERNS
    for pattern in patterns:
        try:
            found = sorted({first_part(path) for path in directory.glob(pattern)})
        except OSError as error:
            raise TokenizerError(f"{directory} cannot be read ({error.strerror})") from None
        if len(found) == 1:
            return _LOADERS[found[0].suffix](found[0])
        if found and model.is_file() and pattern == "tok*.bin":
            return _load_matching(found, model)
        if found:
            names = ", ".join(path.name for path in found[:8])
            raise TokenizerError(f"{directory} contains several tokenizers ({names}); give the path of one")
    raise MissingTokenizerError(
        f"{directory} has no tokenizer ({', '.join(patterns)}); copy the model's tokenizer there"
    )


def _load_matching(paths: list[Path], model: Path) -> Tokenizer:
    """Loads the llama2.c vocabulary whose size is that of the model."""
    try:
        vocab_size = open_source(model).config.vocab_size
    except CheckpointError as error:
        raise TokenizerError(f"cannot determine which tokenizer is the model's: {error}") from None
    for path in paths:
        tokenizer = llama2c_vocab.load(path)
        if tokenizer.vocab_size == vocab_size:
            return tokenizer
    names = ", ".join(path.name for path in paths[:8])
    raise TokenizerError(
        f"{model} has a vocabulary of {vocab_size}; none of {names} next to it has that size, "
        "copy the model's tokenizer there"
    )
