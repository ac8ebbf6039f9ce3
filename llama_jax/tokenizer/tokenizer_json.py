"""Hugging Face's `tokenizer.json`, loaded and encoded by the tokenizers library."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from llama_jax.errors import TokenizerError
from llama_jax.tokenizer.base import REPLACE_EACH, BaseTokenizer, DecodeTable, TokenizerSettings
from llama_jax.tokenizer.byte_level import piece_bytes
from llama_jax.tokenizer.files import MAX_IDS, one_line, parse_json_object, read_bytes
from llama_jax.tokenizer.hf_config import HFConfig, read_hf_config
from llama_jax.tokenizer.normalizer_limits import growth_check
from llama_jax.tokenizer.regex_limits import encode_before_deadline, needs_deadline

_MODELS = ("BPE", "Unigram")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class HuggingFaceTokenizer(BaseTokenizer):
    """A `Tokenizer` with a `tokenizers.Tokenizer` as its encoder.

    Attributes:
      gguf_pre: GGUF's name of the pre-tokenizer (`tokenizer.ggml.pre`), if loaded from a GGUF file.
      check_text: raises an error for a text that the file's normalizer would lengthen too much; or None.
      deadline: whether a text is encoded with a limit on time, for the file's regular expressions.
    """

    check_text: Callable[[str], None] | None = None
    deadline: bool = False

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
        if self.check_text is not None:
            self.check_text(text)
        backend = self._special_backend if parse_special else self._backend
        with _errors_as_one_line(f"{self.origin} cannot encode {text[:40]!r}"):
            if self.deadline:
                return encode_before_deadline(self.origin, backend, text)
            return backend.encode(text, add_special_tokens=False).ids


@contextlib.contextmanager
def _errors_as_one_line(problem: str) -> Iterator[None]:
    """Turns the library's errors into `problem` with their reason."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, TokenizerError):
        raise
    except BaseException as error:  # it raises bare Exceptions, and a Rust panic is a BaseException
        raise TokenizerError(f"{problem} ({one_line(error)}); take a fresh copy") from None


def load(path: Path) -> HuggingFaceTokenizer:
    """Loads a `tokenizer.json`, with the settings of the configuration files next to it.

    What is prepended and appended to a text is what the file's post-processor does, as in transformers 5,
    whatever `add_bos_token` and `add_eos_token` say.

    Raises:
      TokenizerError: if the file is missing, malformed, or of a kind that Llama models do not use.
    """
    data, hf_config = read_bytes(path), read_hf_config(path)
    content: Mapping[str, Any] = parse_json_object(path, data)
    if (changed := with_prefix_space(content, hf_config)) is not content:
        content, data = changed, json.dumps(changed).encode()
    space_style = _space_style(path, content, hf_config.tokenizer_class)
    with _errors_as_one_line(f"{path} cannot be loaded"):
        backend = tokenizers.Tokenizer.from_buffer(data)
    check_text = growth_check(str(path), content.get("normalizer"))
    if check_text is not None:
        check_text("a")  # what `_prefix` encodes
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
    settings = _settings(path, hf_config, backend, vocabulary)
    # BOS and EOS are control tokens even if the file does not mark them as special.
    unmarked = settings.control_ids - _special_ids(backend)
    names = [name for name, token in vocabulary.items() if token in unmarked]
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    )
    table = _decode_table(backend, vocabulary, space_style)
    tokenizer = HuggingFaceTokenizer(backend, table, settings, str(path))
    tokenizer.check_text = check_text
    tokenizer.deadline = needs_deadline(content.get("normalizer"), content.get("pre_tokenizer"))
    return tokenizer


def with_prefix_space(content: Mapping[str, Any], hf_config: HFConfig) -> Mapping[str, Any]:
    """Applies `add_prefix_space` to a tokenizer.json, for the classes that read it in transformers.

    Returns:
      `content` itself, or a changed copy.
    """
    wanted, family = hf_config.add_prefix_space, hf_config.tokenizer_class
    if family.startswith("GPT2Tokenizer") and wanted:
        return {**content, "pre_tokenizer": _change_steps(content.get("pre_tokenizer"), _byte_level_prefix)}
    if family.startswith("LlamaTokenizer") and wanted is False:
        parts = ("normalizer", "pre_tokenizer", "decoder")
        return {**content, **{part: _change_steps(content.get(part), _without_prefix) for part in parts}}
    return content


def _byte_level_prefix(step: dict[str, Any]) -> dict[str, Any]:
    return {**step, "add_prefix_space": True} if step.get("type") == "ByteLevel" else step


def _without_prefix(step: dict[str, Any]) -> dict[str, Any] | None:
    kind = step.get("type")
    if kind == "Prepend" or (kind == "Strip" and step.get("content") == " "):
        return None
    return {**step, "prepend_scheme": "never"} if kind == "Metaspace" else step


def _change_steps(part: Any, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Any:
    """Changes or removes the steps of a normalizer, pre-tokenizer or decoder."""
    if not isinstance(part, dict):
        return part
    for key in ("normalizers", "pretokenizers", "decoders"):
        if isinstance(steps := part.get(key), list):
            changed = [change(step) if isinstance(step, dict) else step for step in steps]
            return {**part, key: [step for step in changed if step is not None]}
    return change(part)


def _space_style(path: Path, content: Mapping[str, Any], tokenizer_class: str) -> str:
    """Returns how pieces represent spaces: `byte-level`, `prefixed` or `plain`.

    The latter two are SentencePiece's U+2581; `prefixed` prepends a space to every text, `plain` does not.
    They end in `bytes` if pieces such as <0x41> stand for bytes.
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
    # transformers' LlamaTokenizer has a decoder of its own.
    suffix = ", bytes" if "ByteFallback" in kinds or tokenizer_class.startswith("Llama") else ""
    if "Metaspace" in kinds:
        step = kinds["Metaspace"]
        prepends = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        return ("prefixed" if prepends else "plain") + suffix
    if "Replace" in kinds or "ByteFallback" in kinds:
        return ("prefixed" if "Strip" in kinds else "plain") + suffix
    raise TokenizerError(
        f"{path}: the decoder is {kind(decoder)[:40]!r}; llama_jax supports byte-level vocabularies "
        "(ByteLevel) and SentencePiece ones (Metaspace, or Replace and ByteFallback)"
    )


def _settings(
    path: Path, hf_config: HFConfig, backend: tokenizers.Tokenizer, vocabulary: Mapping[str, int]
) -> TokenizerSettings:
    settings = hf_config.apply(TokenizerSettings(), vocabulary, max(vocabulary.values()) + 1)
    prefix, suffix = _added(path, backend)
    if settings.bos_id is None and set(prefix[:1]) & (_special_ids(backend) - {settings.eos_id}):
        settings = dataclasses.replace(settings, bos_id=prefix[0])
    other = () if prefix == (settings.bos_id,) else prefix
    return dataclasses.replace(settings, add_bos=bool(prefix), prefix_ids=other, suffix_ids=suffix)


def _added(path: Path, backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that the post-processor prepends and appends to a text."""
    with _errors_as_one_line(f"{path}: its post_processor cannot be run"):
        text, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = (i for i in range(len(whole) - len(text) + 1) if whole[i : i + len(text)] == text)
    start = next(starts, 0)
    return tuple(whole[:start]), tuple(whole[start + len(text) :])


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
        elif "bytes" in space_style and (byte := BYTE_PIECE.fullmatch(name)) and token not in added:
            pieces[token] = bytes.fromhex(byte[1])
        else:
            pieces[token] = name.replace("\u2581", " ").encode()
    special = {entry.content: token for token, entry in added.items() if entry.special}
    for name, token in special.items():
        pieces[token] = name.encode()
    if space_style == "byte-level":
        return DecodeTable(pieces, special)
    spaced = frozenset(token for token, piece in enumerate(pieces) if piece.startswith(b" "))
    space_prefixed = spaced if space_style.startswith("prefixed") else frozenset()
    return DecodeTable(pieces, special, space_prefixed, errors=REPLACE_EACH)
