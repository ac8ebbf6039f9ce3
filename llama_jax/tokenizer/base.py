"""What every tokenizer is: the interface, and the half of it that all vocabularies share.

A vocabulary, whatever its file format, is a table from id to bytes plus a way to encode text. The
table alone decides decoding, so `decode` and `stream` are written once, here.
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
# name only one of them as the end token, while the model may write any.
END_TOKENS = (
    *("</s>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>"),
)


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
      vocab_size: number of ids; every id is in [0, vocab_size).
      bos_id, eos_id, unk_id, pad_id: the vocabulary's own, or None.
      eos_ids: every id that ends a text: `eos_id` and the ends of turns and documents.
      add_bos: whether `encode` begins with BOS unless told otherwise.
      special_tokens: the control tokens, spelling to id.
      chat_template: the Jinja template that came with the vocabulary, or None.
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
        self, text: str, *, add_bos: bool | None = None, add_eos: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Returns the ids of `text`."""

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`."""

    def piece(self, id: int) -> str:
        """Returns one vocabulary entry as text for display."""

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Returns a decoder that takes ids one at a time."""


@dataclasses.dataclass(frozen=True)
class Roles:
    """Which ids play which part: what a file says beside its pieces."""

    bos_id: int | None = None
    eos_id: int | None = None
    unk_id: int | None = None
    pad_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: str | None = None

    @property
    def control(self) -> set[int]:
        """Ids that text must never become, whatever kind of piece the file calls them."""
        return {token for token in (self.bos_id, self.eos_id, *self.eos_ids) if token is not None}


@dataclasses.dataclass(frozen=True)
class Table:
    """How ids become bytes.

    Attributes:
      pieces: the bytes of each id; a control token's are its spelling.
      special: control tokens, spelling to id; `decode` skips them unless asked not to.
      prefixed: ids that lose their leading space when they open a text: the space is the one that
        SentencePiece puts before every text. Empty for byte-level vocabularies.
      trims: whether every leading space goes and not the first alone (SentencePiece's
        `remove_extra_whitespaces`).
      errors: name of the codec error handler for bytes that are not UTF-8.
    """

    pieces: Sequence[bytes]
    special: Mapping[str, int]
    prefixed: frozenset[int] = frozenset()
    trims: bool = False
    errors: str = "replace"

    @functools.cached_property
    def visible(self) -> Sequence[bytes]:
        """`pieces` with nothing for the control tokens."""
        hidden = frozenset(self.special.values())
        return [b"" if token in hidden else piece for token, piece in enumerate(self.pieces)]


class StreamDecoder:
    """Turns ids into text as they come.

    The pieces that `push` returns, followed by `flush`, are `decode` of all the ids. A character
    whose bytes are spread over several ids comes with the last of them.
    """

    def __init__(self, table: Table, origin: str, skip_special_tokens: bool = True):
        self._table = table
        self._origin = origin
        self._pieces = table.visible if skip_special_tokens else table.pieces
        self._restart()

    def _restart(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(self._table.errors)
        self._opening = bool(self._table.prefixed)

    def push(self, id: int) -> str:
        """Returns the text that `id` completes, often one piece, sometimes nothing."""
        return self.extend((id,))

    def extend(self, ids: Iterable[int]) -> str:
        """Returns the text that `ids` complete, as if each had been pushed."""
        checked = checked_ids(ids, len(self._pieces), self._origin)
        data = b"".join(map(self._pieces.__getitem__, checked))
        if self._opening:
            data = self._open(checked)
        return self._utf8.decode(data)

    def _open(self, ids: list[int]) -> bytes:
        """Returns the bytes of `ids` without the prefix space of a text that they may open."""
        chunks = []
        for token in ids:
            chunk = self._pieces[token]
            if self._opening and chunk:
                prefixed = token in self._table.prefixed
                chunk = chunk[1:] if prefixed else chunk
                self._opening = self._table.trims and not chunk
            chunks.append(chunk)
        return b"".join(chunks)

    def flush(self) -> str:
        """Ends the text: returns what an unfinished character leaves, and is ready for another."""
        rest = self._utf8.decode(b"", final=True)
        self._restart()
        return rest


class TableTokenizer(abc.ABC):
    """A `Tokenizer` over a `Table`; a subclass adds `_encode` and `spelling`.

    Attributes:
      table: how ids become bytes.
      origin: the file that it came from.

    Raises:
      TokenizerError: if a role names an id that the table lacks.
    """

    def __init__(self, table: Table, roles: Roles, origin: str):
        self.vocab_size = len(table.pieces)
        for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
            checked_role(name, getattr(roles, name), self.vocab_size, origin)
        for token in roles.eos_ids:
            checked_role("eos_ids", token, self.vocab_size, origin)
        self.bos_id = roles.bos_id
        self.eos_id = roles.eos_id
        self.unk_id = roles.unk_id
        self.pad_id = roles.pad_id
        named = [table.special[name] for name in END_TOKENS if name in table.special]
        main = [] if roles.eos_id is None else [roles.eos_id]
        self.eos_ids = tuple(dict.fromkeys([*main, *roles.eos_ids, *named]))
        self.add_bos = roles.add_bos and roles.bos_id is not None
        self.special_tokens = table.special
        self.chat_template = roles.chat_template
        self.table = table
        self.origin = origin

    @abc.abstractmethod
    def _encode(self, text: str, parse_special: bool) -> list[int]:
        """Returns the ids of `text` alone; control tokens only where `parse_special`."""

    @abc.abstractmethod
    def spelling(self, id: int) -> str:
        """Returns one vocabulary entry as its file spells it."""

    def encode(
        self, text: str, *, add_bos: bool | None = None, add_eos: bool = False, parse_special: bool = False
    ) -> list[int]:
        """Returns the ids of `text`.

        What the vocabulary cannot spell becomes its unknown token; where it has none, as byte-level
        vocabularies do not, bytes without a piece are left out, as Hugging Face's tokenizers do.

        Args:
          text: any text; NUL and other control characters are ordinary.
          add_bos: whether to begin with BOS, unless the text itself does; None is the vocabulary's
            own rule, `self.add_bos`.
          add_eos: whether to end with EOS, unless the text itself does.
          parse_special: whether control tokens spelled in the text become their ids. Leave it off
            for text that others wrote: `</s>` then stays four characters.

        Returns:
          The ids, a list of int.

        Raises:
          TokenizerError: for text that is not a str or has a lone surrogate, and for a BOS or EOS
            that the vocabulary lacks.
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
            bos = self._required("BOS", self.bos_id)
            if ids[:1] != [bos]:
                ids.insert(0, bos)
        if add_eos:
            eos = self._required("EOS", self.eos_id)
            if ids[-1:] != [eos]:
                ids.append(eos)
        return ids

    def _required(self, name: str, token: int | None) -> int:
        if token is None:
            raise TokenizerError(f"{self.origin} names no {name} token; encode without add_{name.lower()}")
        return token

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of `ids`.

        Bytes that are not UTF-8 become U+FFFD. Skipped tokens are as if they were absent.

        Args:
          ids: a flat sequence or array of ids.
          skip_special_tokens: whether control tokens are left out rather than spelled.

        Raises:
          TokenizerError: for an id outside the vocabulary.
        """
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return stream.extend(ids) + stream.flush()

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """Returns a decoder that takes ids one at a time."""
        return StreamDecoder(self.table, self.origin, skip_special_tokens)

    def piece(self, id: int) -> str:
        """Returns one vocabulary entry as text for display: bytes that are not text as `<0xE4>`."""
        (token,) = checked_ids((id,), self.vocab_size, self.origin)
        data = self.table.pieces[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in data)


def checked_ids(ids: Iterable[int], vocab_size: int, origin: str) -> list[int]:
    """Returns `ids` as a list of int, all within the vocabulary.

    Raises:
      TokenizerError: naming the first bad id and the vocabulary's size.
    """
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    try:
        checked = [operator.index(value) for value in values]
    except TypeError:
        shown = " ".join(repr(ids).split())[:60]
        raise TokenizerError(
            f"token ids are {shown}; they must be a flat sequence of whole numbers"
        ) from None
    if checked and not (min(checked) >= 0 and max(checked) < vocab_size):
        bad = next(token for token in checked if not 0 <= token < vocab_size)
        raise TokenizerError(
            f"token id {bad} is outside the vocabulary of {origin}; its {vocab_size} ids run from 0 to "
            f"{vocab_size - 1}"
        )
    return checked


def checked_role(name: str, token: int | None, vocab_size: int, origin: str) -> None:
    """Raises TokenizerError if `token` is an id that the vocabulary lacks."""
    if token is not None and not 0 <= token < vocab_size:
        raise TokenizerError(
            f"{origin}: {name} is {token}, but the vocabulary's {vocab_size} ids run from 0 to "
            f"{vocab_size - 1}; the file contradicts itself, take a fresh copy"
        )


def replace_each(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: one U+FFFD for each bad byte, which is SentencePiece's rule."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


EACH = "llama_jax.replace_each"
codecs.register_error(EACH, replace_each)
