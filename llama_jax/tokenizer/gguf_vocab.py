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
from llama_jax.tokenizer.base import (
    END_TOKENS,
    BaseTokenizer,
    DecodeTable,
    TokenizerSettings,
    validate_special_id,
)
from llama_jax.tokenizer.byte_level import piece_bytes
from llama_jax.tokenizer.files import one_line
from llama_jax.tokenizer.pre_tokenizers import PRE_TOKENIZERS
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
    decode_table,
)
from llama_jax.tokenizer.tokenizer_json import HuggingFaceTokenizer
from llama_jax.weights import read_gguf_metadata

PREFIX = "tokenizer.ggml."
NO_TOKEN = 0xFFFF_FFFF  # -1 as uint32: some converters write it for an undefined special token


def load(path: Path) -> BaseTokenizer:
    """Loads the vocabulary of a GGUF file, without reading tensors.

    Raises:
      TokenizerError: if the file is not GGUF, or its vocabulary is missing, incomplete, inconsistent or of an
        unsupported kind.
    """
    try:
        metadata = read_gguf_metadata(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None
    return from_metadata(metadata, str(path))


def from_metadata(metadata: Mapping[str, Any], origin: str) -> BaseTokenizer:
    """Builds the tokenizer from the metadata of a GGUF file; see `load`."""
    kind = metadata.get(f"{PREFIX}model")
    if kind in (None, "no_vocab"):
        raise MissingTokenizerError(
            f"{origin} has no vocabulary; give the model's own with tokenizer (--tokenizer)"
        )
    if kind not in ("llama", "gpt2"):
        raise TokenizerError(
            f"{origin}: {PREFIX}model is {str(kind)[:40]!r}; llama_jax supports 'llama' (SentencePiece) and "
            "'gpt2' (byte-level BPE); give the model's own with tokenizer (--tokenizer)"
        )
    vocabulary = _Vocabulary(metadata, origin)
    return vocabulary.sentencepiece() if kind == "llama" else vocabulary.byte_level()


class _Vocabulary:
    """The tokenizer keys of a GGUF file, validated on access."""

    def __init__(self, metadata: Mapping[str, Any], origin: str):
        self.metadata = metadata
        self.origin = origin
        self.tokens = self.strings("tokens")
        if len(set(self.tokens)) != len(self.tokens):
            ((duplicate, _),) = collections.Counter(self.tokens).most_common(1)
            raise self.error("tokens", f"contains {duplicate[:40]!r} more than once")
        self.kinds: list[int] = [NORMAL] * len(self.tokens)
        if f"{PREFIX}token_type" in metadata:
            self.kinds = self.array("token_type", "iu").tolist()
        # As in llama.cpp: older converters wrote every added token as user-defined.
        self.kinds = [
            CONTROL if kind == USER_DEFINED and token in END_TOKENS else kind
            for token, kind in zip(self.tokens, self.kinds, strict=True)
        ]
        unknown = set(self.kinds) - set(range(NORMAL, BYTE + 1))
        if unknown:
            raise self.error("token_type", f"contains {min(unknown)}; the types are {NORMAL} to {BYTE}")

    def error(self, key: str, problem: str) -> TokenizerError:
        return TokenizerError(f"{self.origin}: {PREFIX}{key} {problem}; convert the model again")

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(f"{PREFIX}{key}")
        if not isinstance(value, list) or not value or not isinstance(value[0], str):
            raise self.error(key, "is missing" if value is None else "is not a list of strings")
        return value

    def array(self, key: str, dtype_kinds: str) -> np.ndarray:
        """Returns an array [V] whose `dtype.kind` is in `dtype_kinds`."""
        value = self.metadata.get(f"{PREFIX}{key}")
        if not isinstance(value, np.ndarray) or value.dtype.kind not in dtype_kinds:
            expected = "floats" if dtype_kinds == "f" else "integers"
            raise self.error(key, "is missing" if value is None else f"is not an array of {expected}")
        if len(value) != len(self.tokens):
            raise self.error(key, f"has {len(value)} entries for {len(self.tokens)} tokens")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.metadata.get(f"{PREFIX}{key}", default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {str(value)[:40]}; it must be a bool")
        return value

    def settings(self, *, add_bos: bool, **defaults: int) -> TokenizerSettings:
        def token(key: str) -> int | None:
            value = self.metadata.get(f"{PREFIX}{key}_token_id", defaults.get(key))
            if value is not None and type(value) is not int:
                raise self.error(f"{key}_token_id", f"is {str(value)[:40]}; it must be an integer")
            if value == NO_TOKEN:
                return None
            validate_special_id(f"{PREFIX}{key}_token_id", value, len(self.tokens), self.origin)
            return value

        end_ids, eos_id = (token("eot"), token("eom")), token("eos")
        template = self.metadata.get("tokenizer.chat_template")
        return TokenizerSettings(
            bos_id=token("bos"),
            eos_id=eos_id,
            unk_id=token("unknown"),
            pad_id=token("padding"),
            eos_ids=tuple(end_id for end_id in end_ids if end_id is not None),
            add_bos=self.boolean("add_bos_token", add_bos),
            suffix_ids=(eos_id,) if eos_id is not None and self.boolean("add_eos_token", False) else (),
            chat_template=template if isinstance(template, str) else None,
        )

    def merges(self) -> list[tuple[str, str]]:
        pairs = []
        for i, merge in enumerate(self.strings("merges")):
            left, _, right = merge.partition(" ")
            if not left or not right or " " in right:
                raise self.error("merges", f"entry {i} is {merge[:40]!r}, which is not two pieces")
            pairs.append((left, right))
        return pairs

    def sentencepiece(self) -> SentencePieceTokenizer:
        settings = self.settings(add_bos=True, bos=1, eos=2, unknown=0)  # llama.cpp's defaults
        kinds = [
            CONTROL if i in settings.control_ids and kind != UNKNOWN else kind
            for i, kind in enumerate(self.kinds)
        ]
        scores = self.array("scores", "f").astype(np.float32)
        if not np.isfinite(scores).all():
            raise self.error("scores", "contains a value that is not finite")
        model = build_model(
            map(Piece, self.tokens, scores.tolist(), kinds),
            self.origin,
            add_space_prefix=self.boolean("add_space_prefix", True),
            remove_extra_whitespaces=self.boolean("remove_extra_whitespaces", False),
        )
        return SentencePieceTokenizer(model, decode_table(model), settings, self.origin)

    def byte_level(self) -> HuggingFaceTokenizer:
        name = self.metadata.get(f"{PREFIX}pre", "default")
        pre = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
        if pre is None:
            raise TokenizerError(
                f"{self.origin}: {PREFIX}pre is {str(name)[:40]!r}, an unknown pre-tokenizer; known are "
                f"{', '.join(PRE_TOKENIZERS)}; give the model's tokenizer.json with tokenizer (--tokenizer)"
            )
        settings = self.settings(add_bos=pre.add_bos)
        special = {
            token: i
            for i, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True))
            if kind in (UNKNOWN, CONTROL) or i in settings.control_ids
        }
        user_defined = [
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
            raise self.error("merges", f"cannot be used ({one_line(error)})") from None
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre.build()
        backend.decoder = decoders.ByteLevel()
        if pre.normalizer:
            backend.normalizer = pre.normalizer()
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        backend.add_tokens([AddedToken(token, normalized=False) for token in user_defined])
        literal = {*special, *user_defined}
        pieces = [token.encode() if token in literal else piece_bytes(token) for token in self.tokens]
        # Unused ids decode to nothing, as in llama.cpp.
        pieces = [b"" if kind == UNUSED else piece for piece, kind in zip(pieces, self.kinds, strict=True)]
        return HuggingFaceTokenizer(
            backend, DecodeTable(pieces, special), settings, self.origin, gguf_pre=name
        )
