"""Tokenizers: text to token ids and back, from any vocabulary file that Llama models come with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from llama_jax.errors import CheckpointError, MissingTokenizerError, TokenizerError
from llama_jax.tokenizer import gguf_vocab, llama2c_vocab, sentencepiece_model, tokenizer_json
from llama_jax.tokenizer.base import StreamDecoder, Tokenizer
from llama_jax.weights import open_source
from llama_jax.weights.gguf_header import MAGIC

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]

_LOADERS: Mapping[str, Callable[[Path], Tokenizer]] = {
    ".json": tokenizer_json.load,
    ".model": sentencepiece_model.load,
    ".gguf": gguf_vocab.load,
    ".bin": llama2c_vocab.load,
}
# What is looked for in a directory, in this order: the most specific description first.
_PATTERNS = ("tokenizer.json", "tokenizer.model", "tok*.bin", "*.gguf")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      path: a `tokenizer.json`, a SentencePiece `.model`, a `.gguf`, or a llama2.c `tok*.bin`; or a
        directory with one of them (the first of these), or a llama2.c model `.bin` with one beside it.

    Raises:
      TokenizerError: if there is none, or it cannot be read.
    """
    try:
        path = Path(path).expanduser()
    except RuntimeError as error:  # no such user's home
        raise TokenizerError(f"{path}: {error}; give the whole path") from None
    try:
        return _load(path)
    except OSError as error:  # a folder on the way that may not be entered, a name too long, ...
        raise TokenizerError(
            f"{path} cannot be read ({error.strerror or error}); check its path and permissions"
        ) from None


def _load(path: Path) -> Tokenizer:
    if path.is_dir():
        return _load_from(path, path)
    if path.suffix == ".bin" and not path.name.startswith("tok"):
        if not path.exists():
            raise TokenizerError(f"{path} does not exist; give the path of a tokenizer file or a model")
        return _load_from(path.parent, path)
    if path.suffix not in _LOADERS and path.is_file():
        with path.open("rb") as file:
            if file.read(len(MAGIC)) == MAGIC:  # which may have any name
                return gguf_vocab.load(path)
    if path.suffix not in _LOADERS:
        raise TokenizerError(
            f"{path} has no name of a tokenizer file; give a tokenizer.json, a .model, a .gguf, a tok*.bin, "
            "or a directory with one of them"
        )
    return _LOADERS[path.suffix](path)


def _load_from(directory: Path, model: Path) -> Tokenizer:
    """Loads the tokenizer that lies in `directory` for `model`."""
    # Another model's file is no place to look for a llama2.c model's vocabulary.
    patterns = _PATTERNS[:-1] if model.suffix == ".bin" and model.is_file() else _PATTERNS
    for pattern in patterns:
        try:
            found = sorted(directory.glob(pattern))
        except OSError as error:
            raise TokenizerError(f"{directory} cannot be read ({error.strerror})") from None
        if len(found) == 1:
            return _LOADERS[found[0].suffix](found[0])
        if found and model.is_file() and pattern == "tok*.bin":
            return _of_size(found, model)
        if found:
            names = ", ".join(path.name for path in found[:8])
            raise TokenizerError(f"{directory} holds several vocabularies ({names}); give the path of one")
    raise MissingTokenizerError(
        f"{directory} has no tokenizer ({', '.join(patterns)}); put the model's own there"
    )


def _of_size(paths: list[Path], model: Path) -> Tokenizer:
    """Loads the one of the vocabularies beside a llama2.c model that has the model's size."""
    try:
        vocab_size = open_source(model).config.vocab_size
    except CheckpointError as error:
        raise TokenizerError(
            f"cannot tell which of the vocabularies beside it is the model's: {error}"
        ) from None
    for path in paths:
        tokenizer = llama2c_vocab.load(path)
        if tokenizer.vocab_size == vocab_size:
            return tokenizer
    names = ", ".join(path.name for path in paths[:8])
    raise TokenizerError(f"{model} has a vocabulary of {vocab_size}; none of {names} beside it has that size")
