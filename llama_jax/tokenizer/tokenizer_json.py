"""Hugging Face's `tokenizer.json`, read and encoded by the tokenizers library."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer import settings
from llama_jax.tokenizer.base import EACH, Roles, Table, TableTokenizer
from llama_jax.tokenizer.byte_level import piece_bytes
from llama_jax.tokenizer.files import one_line, parse_json_object, read_bytes

_MODELS = ("BPE", "Unigram")
_MOST_IDS = 1 << 22  # far beyond any vocabulary; ids in a file are believed up to here
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class LibraryTokenizer(TableTokenizer):
    """A `Tokenizer` whose text is encoded by a `tokenizers.Tokenizer`.

    Attributes:
      pre: GGUF's name for the way text is cut before merging, where the vocabulary came with one.
    """

    def __init__(
        self, library: tokenizers.Tokenizer, table: Table, roles: Roles, origin: str, pre: str | None = None
    ):
        super().__init__(table, roles, origin)
        library.encode_special_tokens = True  # spelled control tokens are encoded as text
        self._plain = library
        self.pre = pre

    def spelling(self, id: int) -> str:
        """Returns one vocabulary entry as its file spells it; nothing for an id without one."""
        return self._plain.id_to_token(id) or ""

    def library(self) -> tokenizers.Tokenizer:
        """Returns a copy of the library's tokenizer."""
        return tokenizers.Tokenizer.from_str(self._plain.to_str())

    @functools.cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        # A second instance, since the library's switch is state that threads would share.
        library = self.library()
        library.encode_special_tokens = False
        return library

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        library = self._parsing if parse_special else self._plain
        return library.encode(text, add_special_tokens=False).ids


def load(path: Path) -> LibraryTokenizer:
    """Loads a `tokenizer.json`, with what the files beside it say of roles, BOS and chat template.

    BOS comes first if tokenizer_config.json says so, or says nothing and the file's own post-processor
    puts it there. EOS never comes by itself.

    Raises:
      TokenizerError: if the file is missing, malformed, or of a kind that Llama models do not use.
    """
    data = read_bytes(path)
    spaces = _spaces(path, parse_json_object(path, data))
    try:
        library = tokenizers.Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and what Rust panics with is none
        raise TokenizerError(f"{path} cannot be loaded ({one_line(error)}); take a fresh copy") from None
    library.no_truncation()
    library.no_padding()
    vocabulary = library.get_vocab(with_added_tokens=True)
    if not vocabulary or max(vocabulary.values()) >= _MOST_IDS:
        what = f"goes up to id {max(vocabulary.values())}" if vocabulary else "is empty"
        raise TokenizerError(f"{path}: the vocabulary {what}; it must hold 1 to {_MOST_IDS} ids")
    if len(set(vocabulary.values())) != len(vocabulary):
        ((token, _),) = collections.Counter(vocabulary.values()).most_common(1)
        shared = ", ".join(repr(name[:40]) for name, other in vocabulary.items() if other == token)
        raise TokenizerError(f"{path}: {shared} share the id {token}; take a fresh copy")
    roles = _roles(path, library, vocabulary)
    # A token with a role is a control token, whatever the file calls it.
    hidden = roles.control - _special_ids(library)
    names = [name for name, token in vocabulary.items() if token in hidden]
    library.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    )
    return LibraryTokenizer(library, _table(library, vocabulary, spaces), roles, str(path))


def _spaces(path: Path, content: Mapping[str, Any]) -> str:
    """Returns how pieces spell text: `byte-level`, or with a mark for spaces as `prefixed` or `plain`.

    The two latter are SentencePiece's; `prefixed` puts a space before every text, `plain` does not.
    """

    def kind(value: Any) -> str:
        return str(value.get("type")) if isinstance(value, dict) else str(value)

    model = content.get("model")
    untyped = isinstance(model, dict) and "type" not in model and "merges" in model  # GPT-2's own file
    model_kind = "BPE" if untyped else kind(model)
    if model_kind not in _MODELS:
        raise TokenizerError(
            f"{path}: the model's type is {model_kind[:40]!r}; llama_jax reads {' and '.join(_MODELS)}, "
            "which Llama models use"
        )
    decoder = content.get("decoder")
    steps: Any = [decoder]
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        steps = decoder.get("decoders")
    kinds = {kind(step): step for step in steps} if isinstance(steps, list) else {}
    if "ByteLevel" in kinds:
        return "byte-level"
    if "Metaspace" in kinds:
        step = kinds["Metaspace"]
        prepends = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        return "prefixed" if prepends else "plain"
    if "Replace" in kinds or "ByteFallback" in kinds:
        return "prefixed" if "Strip" in kinds else "plain"
    raise TokenizerError(
        f"{path}: the decoder is {kind(decoder)[:40]!r}; llama_jax reads byte-level vocabularies (ByteLevel) "
        "and SentencePiece ones (Metaspace, or Replace and ByteFallback)"
    )


def _roles(path: Path, library: tokenizers.Tokenizer, vocabulary: Mapping[str, int]) -> Roles:
    said = settings.beside(path)
    roles = said.apply(Roles(), vocabulary)
    first = next(iter(library.encode("").ids), None)  # what the post-processor puts before every text
    if roles.bos_id is None and first in _special_ids(library) - {roles.eos_id}:
        roles = dataclasses.replace(roles, bos_id=first)
    if said.add_bos is None:
        roles = dataclasses.replace(roles, add_bos=first is not None and first == roles.bos_id)
    return roles


def _special_ids(library: tokenizers.Tokenizer) -> set[int]:
    return {token for token, added in library.get_added_tokens_decoder().items() if added.special}


def _table(library: tokenizers.Tokenizer, vocabulary: Mapping[str, int], spaces: str) -> Table:
    added = library.get_added_tokens_decoder()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for name, token in vocabulary.items():
        if spaces == "byte-level":
            pieces[token] = name.encode() if token in added else piece_bytes(name)
        elif (byte := BYTE_PIECE.fullmatch(name)) and token not in added:
            pieces[token] = bytes.fromhex(byte[1])
        else:
            pieces[token] = name.replace("\u2581", " ").encode()
    special = {entry.content: token for token, entry in added.items() if entry.special}
    for name, token in special.items():
        pieces[token] = name.encode()
    if spaces == "byte-level":
        return Table(pieces, special)
    opening = frozenset(token for token, piece in enumerate(pieces) if piece.startswith(b" "))
    return Table(pieces, special, opening if spaces == "prefixed" else frozenset(), errors=EACH)
