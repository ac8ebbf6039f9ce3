"""The tokenizer interface, and the base class with everything but encoding.

A vocabulary of any file format is a table from id to bytes plus an encoder. Decoding needs only the table,
so `decode` and `stream` are implemented here for all formats.
"""

from __future__ import annotations

import abc
import codecs
import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from llama_jax.errors import TokenizerError

# Control tokens that end a turn or a document in the vocabularies of the Llama family. Files often
# declare only one of them as EOS, but the model may generate any.
END_TOKENS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end_of_turn|>", "<|end|>", "<EOT>"),
)


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
      vocab_size: number of ids; every id is in [0, vocab_size).
      bos_id, eos_id, unk_id, pad_id: ids of the special tokens, or None.
      eos_ids: every id that ends a text: `eos_id` and the tokens that end a turn or a document.
      add_bos: whether `encode` prepends BOS by default.
      special_tokens: the control tokens and their ids.
      chat_template: the Jinja chat template that comes with the vocabulary, or None.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    special_tokens: Mapping[str, int]
    chat_template: str | None

    def encode(
        self,
        text: str,
        *,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        parse_special: bool = False,
    ) -> list[int]:
        """Returns the ids of `text`."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`."""

    def piece(self, id: int) -> str:
        """Returns one vocabulary entry as text for display."""

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Returns an incremental decoder."""


@dataclasses.dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a vocabulary besides its pieces; see `Tokenizer` for the fields.

    `prefix_ids` are what `encode` prepends where that is not BOS, and `suffix_ids` what it appends.
    """

    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()

    @property
    def control_ids(self) -> set[int]:
        """Ids that ordinary text must never encode to, even if the file does not mark them as control."""
        return {token for token in (self.bos_id, self.eos_id, *self.eos_ids) if token is not None}


@dataclasses.dataclass(frozen=True)
class DecodeTable:
    """The mapping from ids to bytes.

    Attributes:
      pieces: the bytes of each id; for a control token, its name.
      special: control tokens and their ids; `decode` skips them by default.
      space_prefixed: ids whose leading space is dropped at the start of a text, because SentencePiece
        prepends a space to every text. Empty for byte-level vocabularies.
      strip_all: whether all leading spaces are dropped, not only the first (SentencePiece's
        `remove_extra_whitespaces`).
      errors: name of the codec error handler for bytes that are not UTF-8.
    """

    pieces: Sequence[bytes]
    special: Mapping[str, int]
    space_prefixed: frozenset[int] = frozenset()
    strip_all: bool = False
    errors: str = "replace"

    @functools.cached_property
    def pieces_without_special(self) -> Sequence[bytes]:
        """`pieces` with empty bytes for the control tokens."""
        special = frozenset(self.special.values())
        return [b"" if token in special else piece for token, piece in enumerate(self.pieces)]


class StreamDecoder:
    """Incremental decoder.

    The results of `push` and then `flush`, concatenated, equal `decode` of all the ids. A character whose
    bytes span several ids is returned with the last of them.
    """

    def __init__(self, table: DecodeTable, origin: str, skip_special_tokens: bool = True):
        self._table = table
        self._origin = origin
        self._pieces = table.pieces_without_special if skip_special_tokens else table.pieces
        self._reset()

    def _reset(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(self._table.errors)
        self._at_start = bool(self._table.space_prefixed)

    def push(self, id: int) -> str:
        """Returns the text that `id` completes; empty within a multi-byte character."""
        return self.extend((id,))

    def extend(self, ids: Iterable[int]) -> str:
        """Returns the text that `ids` complete, like `push` of each."""
        checked = validate_ids(ids, len(self._pieces), self._origin)
        if self._at_start:
            return self._utf8.decode(self._without_prefix_space(checked))
        return self._utf8.decode(b"".join(map(self._pieces.__getitem__, checked)))

    def _without_prefix_space(self, ids: list[int]) -> bytes:
        """Returns the bytes of `ids`, which may start a text, without its prefix space."""
        chunks = []
        for token in ids:
            chunk = self._pieces[token]
            if self._at_start and chunk:
                chunk = chunk[1:] if token in self._table.space_prefixed else chunk
                self._at_start = self._table.strip_all and not chunk
            chunks.append(chunk)
        return b"".join(chunks)

    def flush(self) -> str:
        """Ends the text: returns U+FFFD for the bytes of an incomplete character, and resets the decoder."""
        rest = self._utf8.decode(b"", final=True)
        self._reset()
        return rest


class BaseTokenizer(abc.ABC):
    """A `Tokenizer` with a `DecodeTable`; subclasses implement `_encode` and `id_to_token`.

    Attributes:
      table: the mapping from ids to bytes.
      origin: the path of the file it was loaded from.
      prefix_ids, suffix_ids: see `TokenizerSettings`.
      unused_ids: ids that stand for nothing: rows of a padded embedding table, see `fit_vocabulary`.
      fitted_from: the vocabulary that `fit_vocabulary` has fitted to a model; None for any other.

    Raises:
      TokenizerError: if a special id is outside the vocabulary.
    """

    def __init__(self, table: DecodeTable, settings: TokenizerSettings, origin: str):
        self.vocab_size = len(table.pieces)
        for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
            validate_special_id(name, getattr(settings, name), self.vocab_size, origin)
        for token in settings.eos_ids:
            validate_special_id("eos_ids", token, self.vocab_size, origin)
        self.bos_id = settings.bos_id
        self.eos_id = settings.eos_id
        self.unk_id = settings.unk_id
        self.pad_id = settings.pad_id
        end_ids = [table.special[name] for name in END_TOKENS if name in table.special]
        eos_id = [] if settings.eos_id is None else [settings.eos_id]
        self.eos_ids = tuple(dict.fromkeys([*eos_id, *settings.eos_ids, *end_ids]))
        self.prefix_ids = settings.prefix_ids
        self.suffix_ids = settings.suffix_ids
        self.add_bos = settings.add_bos and (settings.bos_id is not None or bool(settings.prefix_ids))
        self.special_tokens = table.special
        self.chat_template = settings.chat_template
        self.table = table
        self.origin = origin
        self.unused_ids = range(0)
        self.fitted_from: BaseTokenizer | None = None

    @property
    def added_ids(self) -> frozenset[int]:
        """Ids of tokens that were added to the vocabulary, which no ordinary text needs."""
        return frozenset(self.special_tokens.values())

    @abc.abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]:
        """Returns the ids of `text` without BOS and EOS; control tokens only if `parse_special`."""

    @abc.abstractmethod
    def id_to_token(self, id: int) -> str:
        """Returns one vocabulary entry as it is written in the file."""

    def encode(
        self,
        text: str,
        *,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        parse_special: bool = False,
    ) -> list[int]:
        """Returns the ids of `text`.

        Characters without a piece become the unknown token. In a vocabulary without one (byte-level ones),
        bytes without a piece are dropped, as in Hugging Face's tokenizers.

        Args:
          text: any text, including NUL and other control characters.
          add_bos: whether to prepend BOS, unless the ids begin with it; None means `self.add_bos`.
          add_eos: whether to append EOS, unless the ids end with it; None means what the vocabulary appends
            (`suffix_ids`), and nothing if `add_bos` is given.
          parse_special: whether control tokens in the text become their ids. Keep it off for untrusted
            text: `</s>` then stays four characters.

        Returns:
          The ids, a list of int.

        Raises:
          TokenizerError: for text that is not a str or has a lone surrogate, and if BOS or EOS is requested
            but not defined.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text to encode is of type {type(text).__name__}; it must be a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text to encode has a lone surrogate, {text[error.start]!r}, at character {error.start}; "
                "replace it, for example with text.encode('utf-8', 'replace').decode()"
            ) from None
        ids = self._encode(text, parse_special)
        if self.add_bos if add_bos is None else add_bos:
            prefix = list(self.prefix_ids) or [self._require_id("BOS", self.bos_id)]
            if ids[: len(prefix)] != prefix:
                ids = prefix + ids
        suffix = [self._require_id("EOS", self.eos_id)] if add_eos else []
        if add_eos is None and add_bos is None:
            suffix = list(self.suffix_ids)
        if suffix and ids[-len(suffix) :] != suffix:
            ids = ids + suffix
        if max(ids, default=0) >= self.vocab_size:
            token = max(ids)
            raise TokenizerError(
                f"the text holds {self.id_to_token(token)!r}, id {token}, and the model has embeddings for "
                f"{self.vocab_size} ids; leave it out"
            )
        return ids

    def _require_id(self, name: str, token: int | None) -> int:
        if token is None:
            raise TokenizerError(f"{self.origin} defines no {name} token; encode without add_{name.lower()}")
        return token

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`.

        Bytes that are not UTF-8 become U+FFFD.

        Args:
          ids: a flat sequence or array of ids.
          skip_special_tokens: whether control tokens are omitted.

        Raises:
          TokenizerError: for an id outside the vocabulary.
        """
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return stream.extend(ids) + stream.flush()

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Returns an incremental decoder."""
        return StreamDecoder(self.table, self.origin, skip_special_tokens)

    def piece(self, id: int) -> str:
        """Returns one vocabulary entry as text for display; bytes that are not UTF-8 as `<0xE4>`."""
        (token,) = validate_ids((id,), self.vocab_size, self.origin)
        data = self.table.pieces[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in data)


def validate_ids(ids: Iterable[int], vocab_size: int, origin: str) -> list[int]:
    """Returns `ids` as a list of int, all within the vocabulary.

    Raises:
      TokenizerError: naming the first bad id and the vocabulary's size.
    """
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    try:
        checked = [operator.index(value) for value in values]
    except TypeError:
        shown = " ".join(repr(ids).split())[:60]
        raise TokenizerError(f"token ids are {shown}; they must be a flat sequence of integers") from None
    if checked and not (min(checked) >= 0 and max(checked) < vocab_size):
        bad = next(token for token in checked if not 0 <= token < vocab_size)
        raise TokenizerError(
            f"token id {bad} is outside the vocabulary of {origin}; its {vocab_size} ids run from 0 to "
            f"{vocab_size - 1}"
        )
    return checked


def validate_special_id(name: str, token: int | None, vocab_size: int, origin: str) -> None:
    """Raises TokenizerError if `token` is not None and outside the vocabulary."""
    if token is not None and not 0 <= token < vocab_size:
        raise TokenizerError(
            f"{origin}: {name} is {token}, but the vocabulary's {vocab_size} ids run from 0 to "
            f"{vocab_size - 1}; the file is inconsistent, take a fresh copy"
        )


def replace_each(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler that replaces each invalid byte by one U+FFFD, like SentencePiece."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


REPLACE_EACH = "llama_jax.replace_each"
codecs.register_error(REPLACE_EACH, replace_each)
