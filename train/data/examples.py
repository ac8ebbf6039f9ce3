"""Examples to token ids, and which of them are learned: what a record gives to a row.

Plain text is encoded as `generate` encodes its prompt, and ends with EOS; conversations as `encode_turns`
does; what a classifier reads has no EOS of its own, as for Hugging Face's.

An example is never cut in two. One that is longer than a row is dropped, or, by `data.too_long =
"truncate"`, loses its end: of a preference pair, the ends of the answers, each cut to the same greatest
length that lets both segments into one row. What has nothing left to learn is dropped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from llama_jax.chat import ChatTemplate, encode_chat, encode_turns
from llama_jax.errors import DataError, InputError, TokenizerError
from llama_jax.tokenizer import Tokenizer

from ..config.data import SourceConfig, TooLong
from ..config.objective import PAIRS, Objective
from .encode import Encoder
from .forms import Example, Forms, Plain, Side
from .records import BadRecord, Records, TooLongRecord, keys, refusal
from .tables import Parquet

_SEAM = "\ue000"  # no piece of a vocabulary merges with it


@dataclasses.dataclass(frozen=True)
class Segment:
    """A text that attends to itself alone.

    Attributes:
      ids: int32 [n].
      mask: int32 [n], 1 for what counts: the tokens that are learned, or the one that a label belongs to.
    """

    ids: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one record gives a row, which is never split: one segment, or the two of a pair.

    Attributes:
      segments: in their order; of a pair, the chosen answer's first.
      value: the label or margin, which stands at the last token of each segment.
      reference: of each segment the log-probability that the reference model gives what of it is learned;
        empty where that was not computed beforehand.
    """

    segments: tuple[Segment, ...]
    value: float = 0.0
    reference: tuple[float, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.segments))


@dataclasses.dataclass(frozen=True)
class ExampleEncoder:
    """Encodes examples for an objective; it can be pickled.

    Attributes:
      encode: of the tokenizer.
      template: for conversations, or None.
      objective: of the run.
      seq_len: tokens a row.
      too_long: as in `DataConfig`.
    """

    encode: Encoder
    template: ChatTemplate | None
    objective: Objective
    seq_len: int
    too_long: TooLong

    def __call__(self, example: Example) -> Unit:
        """Returns what an example gives a row.

        Raises:
          BadRecord: if it cannot be learned from, a TooLongRecord if it does not fit.
          DataError: for a conversation without a template.
        """
        try:
            segments = self._segments(example)
        except InputError as error:
            raise BadRecord("refused conversation", str(error)) from None
        except TokenizerError as error:
            raise BadRecord("template failed", str(error)) from None
        if not all(segment.mask.any() for segment in segments) and sum(map(len, segments)) <= self.seq_len:
            raise BadRecord("nothing to learn", "the example becomes no token that is to be learned")
        segments = self._fitted(segments)
        if len(segments) == 2 and np.array_equal(segments[0].ids, segments[1].ids):
            raise BadRecord("identical answers", "chosen and rejected become the same tokens")
        return Unit(segments, example.value)

    def _segments(self, example: Example) -> tuple[Segment, ...]:
        try:
            return tuple(map(self._segment, example.sides))
        except TokenizerError:  # perhaps the machine was busy, and the template late: batches must not change
            return tuple(map(self._segment, example.sides))

    def _segment(self, side: Side) -> Segment:
        tokenizer = self.encode.tokenizer
        labelled = self.objective in ("classify", "regress")
        if isinstance(side, Plain):
            ids, mask = _plain(tokenizer, side, end=not labelled)
        elif self.template is None:
            raise DataError(
                "the data holds chat messages, and the model came with no chat template; set data.template "
                "to llama-2, chatml or a file in Jinja"
            )
        elif labelled:
            ids, mask = encode_chat(tokenizer, self.template, side.messages, False), []
        else:
            ids, mask = encode_turns(
                tokenizer, self.template, side.messages, first=side.first, most=self.seq_len
            )
        if labelled:
            mask = [0] * (len(ids) - 1) + [1] * bool(ids)
        return Segment(np.array(ids, np.int32), np.array(mask, np.int32))

    def _fitted(self, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """Returns segments that fit a row."""
        length = sum(map(len, segments))
        if length <= self.seq_len:
            return segments
        said = f"{length} tokens, and train.seq_len is {self.seq_len}"
        if self.too_long != "truncate":
            raise TooLongRecord("too long", said)
        begins = [int(segment.mask.argmax()) if self.objective in PAIRS else 0 for segment in segments]
        room = self.seq_len - sum(begins)
        if room < len(segments):
            raise TooLongRecord("too long", f"{said}; its prompt leaves no room")
        sizes = [len(segment) - begin for segment, begin in zip(segments, begins, strict=True)]
        share = room // len(segments)
        most = max(share, room - min(sizes)) if len(sizes) > 1 else share
        cut = tuple(
            self._cut(segment, begin + min(size, most))
            for segment, begin, size in zip(segments, begins, sizes, strict=True)
        )
        if not all(segment.mask.any() for segment in cut):
            raise TooLongRecord("too long", f"{said}; nothing to learn is left of it")
        if len(cut) == 2 and np.array_equal(cut[0].ids, cut[1].ids):
            raise TooLongRecord("too long", f"{said}; the answers differ only beyond that")
        return cut

    def _cut(self, segment: Segment, end: int) -> Segment:
        mask = segment.mask[:end]
        if self.objective in ("classify", "regress"):
            mask = np.append(mask[1:], np.int32(1))
        return Segment(segment.ids[:end], mask)


def _plain(tokenizer: Tokenizer, side: Plain, *, end: bool) -> tuple[list[int], list[int]]:
    """Returns ids that begin with exactly those of the prompt, and a mask of the rest."""
    prompt = tokenizer.encode(side.prompt)
    ids = tokenizer.encode(side.prompt + side.answer)
    if ids[: len(prompt)] != prompt:
        ids = prompt + _going_on(tokenizer, side.answer)
    if end and tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
    mask = [0] * len(prompt) + [1] * (len(ids) - len(prompt))
    mask[:1] = [0]  # nothing predicts the first
    return ids, mask


def _going_on(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text that goes on after another, without the space that opens SentencePiece's."""
    seam = tokenizer.encode(_SEAM, add_bos=False)
    ids = tokenizer.encode(_SEAM + text, add_bos=False)
    return ids[len(seam) :] if ids[: len(seam)] == seam else tokenizer.encode(text, add_bos=False)


class ExampleSource:
    """The examples of one source, made when they are asked for.

    Attributes:
      records, key, nbytes, blocks, fingerprint: as of `TextSource`.
      form: the name of the form of its records.
    """

    def __init__(self, config: SourceConfig, records: Records, forms: Forms, encode: ExampleEncoder):
        self.records = records
        self.key = keys([file.name for file in records.files], records.counts)
        self.nbytes = records.nbytes
        self.blocks = records.blocks
        self.form = ""
        self._forms = forms
        self._encode = encode
        names = [file.name for file in records.files]
        template = encode.template and [encode.template.source, dict(encode.template.tokens)]
        decides: list[Any] = [type(records).__name__, config.field, names, records.counts.tolist()]
        decides += [dataclasses.astuple(forms), template, encode.too_long]
        said = json.dumps(decides) + records.digest
        self.fingerprint = hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def detect(self, skip_bad: bool) -> None:
        """Finds the form of the records by the first that can be read.

        Raises:
          BadRecord: if that is of no form that the objective accepts.
        """
        for index in range(len(self.key)):
            try:
                row = self.records.row(index)
            except BadRecord:
                if not skip_bad:
                    raise
                continue
            try:
                self.form = self._forms.detect(row)
            except BadRecord as bad:
                raise BadRecord(bad.reason, f"{self.records.where(index)}: {bad.message}") from None
            if isinstance(self.records, Parquet):
                self.records.columns = self._forms.columns(self.form)
            return

    def example(self, index: int) -> Unit:
        """Returns one example.

        Raises:
          BadRecord: if its record cannot be used.
          DataError: if its file cannot be read.
        """
        row = self.records.row(index)
        try:
            return self._encode(self._forms.read(self.form, row))
        except (BadRecord, RecursionError) as error:
            deep = BadRecord("malformed message", "its values are nested too deep")
            bad = error if isinstance(error, BadRecord) else deep
            bad.placed = False
            raise bad from None

    def what(self, bad: BadRecord, index: int) -> str:
        """Returns what is wrong with a record, and where it is."""
        return bad.message if bad.placed else f"{self.records.where(index)}: {bad.message}"


class Examples:
    """Random access to some of a source's examples, or the reasons why there are none."""

    def __init__(
        self,
        source: ExampleSource,
        index: np.ndarray,
        skip_bad: bool,
        too_long: TooLong,
        reference: np.ndarray | None = None,
    ):
        """`reference` is, f32 [records, 2], `Unit.reference` of each, NaN where there is no such example."""
        self._reference = reference
        self._source = source
        self._index = index
        self._skip_bad = skip_bad
        self._too_long = too_long

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> Unit | str:
        index = int(self._index[i])
        try:
            unit = self._source.example(index)
        except TooLongRecord as bad:
            if self._too_long != "fail":
                return bad.reason
            raise DataError(
                f"{self._source.what(bad, index)}; shorten it, raise train.seq_len, or set data.too_long = "
                '"drop"'
            ) from None
        except BadRecord as bad:
            if self._skip_bad:
                return bad.reason
            raise DataError(refusal(self._source.what(bad, index))) from None
        if self._reference is None:
            return unit
        if np.isnan(self._reference[index]).any():
            return "no reference"
        return dataclasses.replace(unit, reference=tuple(self._reference[index].tolist()))

    def __repr__(self) -> str:
        return f"Examples({len(self)})"
