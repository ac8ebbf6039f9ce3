"""Hugging Face's `tokenizer.json`, loaded and encoded by the tokenizers library."""

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
from llama_jax.tokenizer.base import REPLACE_EACH, BaseTokenizer, DecodeTable, TokenizerSettings
from llama_jax.tokenizer.byte_level import piece_bytes
from llama_jax.tokenizer.files import MAX_IDS, one_line, parse_json_object, read_bytes
from llama_jax.tokenizer.hf_config import read_hf_config

_MODELS = ("BPE", "Unigram")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer(BaseTokenizer):
    """A `Tokenizer` with a `tokenizers.Tokenizer` as its encoder.

    Attributes:
      gguf_pre: GGUF's name of the pre-tokenizer (`tokenizer.ggml.pre`), if loaded from a GGUF file.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        table: DecodeTable,
        settings: TokenizerSettings,
        origin: str,
        gguf_pre: str | None = None,
    ):
        super().__init__(table, settings, origin)
        backend.encode_special_tokens = True  # encodes control tokens in the text as ordinary text
        self._backend = backend
        self.gguf_pre = gguf_pre

    def id_to_token(self, id: int) -> str:
        """Returns one vocabulary entry as it is written in the file; empty for an unused id."""
        return self._backend.id_to_token(id) or ""

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of the added tokens."""
        return frozenset(self._backend.get_added_tokens_decoder())

    def copy_backend(self) -> tokenizers.Tokenizer:
        """Returns a copy of the `tokenizers.Tokenizer`."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    @functools.cached_property
    def _special_backend(self) -> tokenizers.Tokenizer:
        # A second instance, because `encode_special_tokens` is mutable state shared by threads.
        backend = self.copy_backend()
        backend.encode_special_tokens = False
        return backend

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        backend = self._special_backend if parse_special else self._backend
        return backend.encode(text, add_special_tokens=False).ids


def load(path: Path) -> HuggingFaceTokenizer:
    """Loads a `tokenizer.json`, with the settings of the configuration files next to it.

    BOS is prepended if tokenizer_config.json sets it, or if it does not and the file's post-processor
    prepends BOS. EOS is never appended by default.

    Raises:
      TokenizerError: if the file is missing, malformed, or of a kind that Llama models do not use.
    """
    data = read_bytes(path)
    space_style = _space_style(path, parse_json_object(path, data))
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions; a Rust panic is a BaseException
        raise TokenizerError(f"{path} cannot be loaded ({one_line(error)}); take a fresh copy") from None
    backend.no_truncation()
    backend.no_padding()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary or max(vocabulary.values()) >= MAX_IDS:
        problem = f"has ids up to {max(vocabulary.values())}" if vocabulary else "is empty"
        raise TokenizerError(f"{path}: the vocabulary {problem}; it must have 1 to {MAX_IDS} ids")
    if len(set(vocabulary.values())) != len(vocabulary):
        ((token, _),) = collections.Counter(vocabulary.values()).most_common(1)
        shared = ", ".join(repr(name[:40]) for name, other in vocabulary.items() if other == token)
        raise TokenizerError(f"{path}: {shared} share the id {token}; take a fresh copy")
    settings = _settings(path, backend, vocabulary)
    # BOS and EOS are control tokens even if the file does not mark them as special.
    unmarked = settings.control_ids - _special_ids(backend)
    names = [name for name, token in vocabulary.items() if token in unmarked]
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    )
    return HuggingFaceTokenizer(backend, _decode_table(backend, vocabulary, space_style), settings, str(path))


def _space_style(path: Path, content: Mapping[str, Any]) -> str:
    """Returns how pieces represent spaces: `byte-level`, `prefixed` or `plain`.

    The latter two are SentencePiece's U+2581; `prefixed` prepends a space to every text, `plain` does not.
    """

    def kind(value: Any) -> str:
        return str(value.get("type")) if isinstance(value, dict) else str(value)

    model = content.get("model")
    untyped = isinstance(model, dict) and "type" not in model and "merges" in model  # as in GPT-2's file
    model_kind = "BPE" if untyped else kind(model)
    if model_kind not in _MODELS:
        raise TokenizerError(
            f"{path}: the model type is {model_kind[:40]!r}; llama_jax supports {' and '.join(_MODELS)}, "
            "the types that Llama models use"
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
        f"{path}: the decoder is {kind(decoder)[:40]!r}; llama_jax supports byte-level vocabularies "
        "(ByteLevel) and SentencePiece ones (Metaspace, or Replace and ByteFallback)"
    )


def _settings(path: Path, backend: tokenizers.Tokenizer, vocabulary: Mapping[str, int]) -> TokenizerSettings:
    hf_config = read_hf_config(path)
    settings = hf_config.apply(TokenizerSettings(), vocabulary, max(vocabulary.values()) + 1)
    prefix = _prefix(path, backend)
    if settings.bos_id is None and set(prefix[:1]) & (_special_ids(backend) - {settings.eos_id}):
        settings = dataclasses.replace(settings, bos_id=prefix[0])
    if hf_config.add_bos is None:
        other = () if prefix == (settings.bos_id,) else prefix
        settings = dataclasses.replace(settings, add_bos=bool(prefix), prefix_ids=other)
    return settings


def _prefix(path: Path, backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """Returns the ids that the post-processor prepends to a text."""
    try:
        text, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic is a BaseException
        raise TokenizerError(
            f"{path}: its post_processor cannot be run ({one_line(error)}); take a fresh copy"
        ) from None
    starts = (i for i in range(len(whole) - len(text) + 1) if whole[i : i + len(text)] == text)
    return tuple(whole[: next(starts, 0)])


def _special_ids(backend: tokenizers.Tokenizer) -> set[int]:
    return {token for token, added in backend.get_added_tokens_decoder().items() if added.special}


def _decode_table(
    backend: tokenizers.Tokenizer, vocabulary: Mapping[str, int], space_style: str
) -> DecodeTable:
    added = backend.get_added_tokens_decoder()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for name, token in vocabulary.items():
        if token in added:  # as it is matched: normalized words have the space before them
            name = backend.id_to_token(token) or name
        if space_style == "byte-level":
            pieces[token] = name.encode() if token in added else piece_bytes(name)
        elif (byte := BYTE_PIECE.fullmatch(name)) and token not in added:
            pieces[token] = bytes.fromhex(byte[1])
        else:
            pieces[token] = name.replace("\u2581", " ").encode()
    special = {entry.content: token for token, entry in added.items() if entry.special}
    for name, token in special.items():
        pieces[token] = name.encode()
    if space_style == "byte-level":
        return DecodeTable(pieces, special)
    spaced = frozenset(token for token, piece in enumerate(pieces) if piece.startswith(b" "))
    space_prefixed = spaced if space_style == "prefixed" else frozenset()
    return DecodeTable(pieces, special, space_prefixed, errors=REPLACE_EACH)
