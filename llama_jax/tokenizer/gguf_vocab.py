"""Vocabularies inside GGUF files: SentencePiece (`llama`) and byte-level BPE (`gpt2`).

Keys are those of the GGUF specification, ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models

from llama_jax.errors import CheckpointError, MissingTokenizerError, TokenizerError
from llama_jax.tokenizer.base import Roles, Table, TableTokenizer, checked_role
from llama_jax.tokenizer.byte_level import PRE_TOKENIZERS, piece_bytes
from llama_jax.tokenizer.files import one_line
from llama_jax.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    SentencePieceTokenizer,
    build_model,
    table,
)
from llama_jax.tokenizer.tokenizer_json import LibraryTokenizer
from llama_jax.weights import read_gguf_metadata

PREFIX = "tokenizer.ggml."
NO_TOKEN = 0xFFFF_FFFF  # -1 as an unsigned number, which some converters write for a role that nothing has


def load(path: Path) -> TableTokenizer:
    """Loads the vocabulary of a GGUF file; no tensor is read.

    Raises:
      TokenizerError: if the file is no GGUF file, has no vocabulary, or one that is of another kind,
        incomplete or contradicts itself.
    """
    try:
        metadata = read_gguf_metadata(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    return from_metadata(metadata, str(path))


def from_metadata(metadata: Mapping[str, Any], origin: str) -> TableTokenizer:
    """Builds the tokenizer that a GGUF file's metadata describe; see `load`."""
    kind = metadata.get(f"{PREFIX}model")
    if kind in (None, "no_vocab"):
        raise MissingTokenizerError(
            f"{origin} has no vocabulary; give the model's own tokenizer file instead"
        )
    if kind not in ("llama", "gpt2"):
        raise TokenizerError(
            f"{origin}: {PREFIX}model is {str(kind)[:40]!r}; llama_jax reads 'llama' (SentencePiece) and "
            "'gpt2' (byte-level BPE), give the model's own tokenizer file instead"
        )
    vocabulary = _Vocabulary(metadata, origin)
    return vocabulary.sentencepiece() if kind == "llama" else vocabulary.byte_level()


class _Vocabulary:
    """A GGUF file's tokenizer keys, checked as they are asked for."""

    def __init__(self, metadata: Mapping[str, Any], origin: str):
        self.metadata = metadata
        self.origin = origin
        self.tokens = self.strings("tokens")
        if len(set(self.tokens)) != len(self.tokens):
            ((twice, _),) = collections.Counter(self.tokens).most_common(1)
            raise self.wrong("tokens", f"holds {twice[:40]!r} more than once")
        self.kinds: list[int] = [NORMAL] * len(self.tokens)
        if f"{PREFIX}token_type" in metadata:
            self.kinds = self.numbers("token_type", "iu").tolist()
        bad = set(self.kinds) - set(range(NORMAL, BYTE + 1))
        if bad:
            raise self.wrong("token_type", f"holds {min(bad)}; known are {NORMAL} to {BYTE}")

    def wrong(self, key: str, what: str) -> TokenizerError:
        return TokenizerError(f"{self.origin}: {PREFIX}{key} {what}; convert the model again")

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(f"{PREFIX}{key}")
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            raise self.wrong(key, "is missing" if value is None else "is not a list of strings")
        return value

    def numbers(self, key: str, kinds: str) -> np.ndarray:
        """Returns one number a token; `kinds` are the NumPy kinds it may have."""
        value = self.metadata.get(f"{PREFIX}{key}")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            raise self.wrong(key, "is missing" if value is None else "is not an array of the right numbers")
        if len(value) != len(self.tokens):
            raise self.wrong(key, f"has {len(value)} entries for {len(self.tokens)} tokens")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(f"{PREFIX}{key}", default)
        if not isinstance(value, bool):
            raise self.wrong(key, f"is {str(value)[:40]}; it must be a bool")
        return value

    def roles(self, *, add_bos: bool, **defaults: int) -> Roles:
        def token(key: str) -> int | None:
            value = self.metadata.get(f"{PREFIX}{key}_token_id", defaults.get(key))
            if value is not None and type(value) is not int:
                raise self.wrong(f"{key}_token_id", f"is {str(value)[:40]}; it must be a whole number")
            if value == NO_TOKEN:
                return None
            checked_role(f"{PREFIX}{key}_token_id", value, len(self.tokens), self.origin)
            return value

        ends = (token("eot"), token("eom"))
        template = self.metadata.get("tokenizer.chat_template")
        return Roles(
            bos_id=token("bos"),
            eos_id=token("eos"),
            unk_id=token("unknown"),
            pad_id=token("padding"),
            eos_ids=tuple(end for end in ends if end is not None),
            add_bos=self.flag("add_bos_token", add_bos),
            chat_template=template if isinstance(template, str) else None,
        )

    def merges(self) -> list[tuple[str, str]]:
        pairs = []
        for i, merge in enumerate(self.strings("merges")):
            left, _, right = merge.partition(" ")
            if not left or not right or " " in right:
                raise self.wrong("merges", f"entry {i} is {merge[:40]!r}, which is not two pieces")
            pairs.append((left, right))
        return pairs

    def sentencepiece(self) -> SentencePieceTokenizer:
        roles = self.roles(add_bos=True, bos=1, eos=2, unknown=0)  # the defaults are llama.cpp's
        kinds = [
            CONTROL if i in roles.control and kind != UNKNOWN else kind for i, kind in enumerate(self.kinds)
        ]
        scores = self.numbers("scores", "f").astype(np.float32)
        if not np.isfinite(scores).all():
            raise self.wrong("scores", "holds a value that is not finite")
        model = build_model(
            map(Piece, self.tokens, scores.tolist(), kinds),
            self.origin,
            add_space_prefix=self.flag("add_space_prefix", True),
            remove_extra_whitespaces=self.flag("remove_extra_whitespaces", False),
        )
        return SentencePieceTokenizer(model, table(model), roles, self.origin)

    def byte_level(self) -> LibraryTokenizer:
        name = self.metadata.get(f"{PREFIX}pre", "default")
        pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
        if pre is None:
            raise TokenizerError(
                f"{self.origin}: {PREFIX}pre is {str(name)[:40]!r}, a way to cut text that is not known "
                f"here; known are {', '.join(PRE_TOKENIZERS)}; give the model's tokenizer.json instead"
            )
        roles = self.roles(add_bos=pre.add_bos)
        special = {
            token: i
            for i, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (UNKNOWN, CONTROL) or i in roles.control
        }
        plain = [
            token
            for token, kind in zip(self.tokens, self.kinds, strict=True)
            if kind == USER_DEFINED and token not in special
        ]
        vocabulary = {token: i for i, token in enumerate(self.tokens)}
        try:
            model = models.BPE(vocabulary, self.merges(), ignore_merges=pre.ignore_merges)
        except TokenizerError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise self.wrong("merges", f"cannot be used ({one_line(error)})") from None
        library = Tokenizer(model)
        library.pre_tokenizer = pre.build()
        library.decoder = decoders.ByteLevel()
        if pre.normalizer:
            library.normalizer = pre.normalizer()
        library.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        library.add_tokens([AddedToken(token, normalized=False) for token in plain])
        literal = {*special, *plain}
        pieces = [token.encode() if token in literal else piece_bytes(token) for token in self.tokens]
        # A name that stands for an id without a token is no text, in llama.cpp neither.
        pieces = [b"" if kind == UNUSED else piece for piece, kind in zip(pieces, self.kinds, strict=True)]
        return LibraryTokenizer(library, Table(pieces, special), roles, self.origin, pre=name)
