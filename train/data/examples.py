"""Encodes examples as token ids, with a mask of the tokens that are trained on.

An example is never split. One that is longer than a row is dropped or, with `data.too_long = "truncate"`, cut
at its end: the answers of a preference pair are both cut to the greatest common length that fits the pair
into a row. One of KTO may fill half of a row, which also holds its prompt with another completion. An example
with no tokens left to train on is dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from llama_jax.chat import ChatTemplate
from llama_jax.errors import DataError, InputError, TokenizerError

from ..config.data import SourceConfig, TooLong
from ..config.objective import PAIR_OBJECTIVES, Objective
from .encode import Encoder
from .formats import Example, RecordFormats, Side
from .records import BadRecord, Records, TooLongRecord, bad_record_error
from .sides import PROMPT_DIFFERS, SideEncoder
from .source import RecordSource


@dataclasses.dataclass(frozen=True)
class Segment:
    """A sequence that attends only to itself.

    Attributes:
      ids: int32 [n].
      mask: int32 [n], 1 for the tokens that are trained on, or for the token that a label belongs to.
    """

    ids: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class EncodedExample:
    """One encoded record: one segment, the two of a pair, KTO's two, or one for each turn.

    Attributes:
      segments: of a pair, the chosen answer's first; of KTO, the mismatched one last.
      value: the label or margin, placed at the last token of each segment.
      reference: the reference model's log-probability of the masked tokens of each segment; empty if not
        precomputed.
      apart: whether each segment is an example of its own. Otherwise they stay in one row.
      notes: what is to be said of it.
    """

    segments: tuple[Segment, ...]
    value: float = 0.0
    reference: tuple[float, ...] = ()
    apart: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    def parts(self) -> list[EncodedExample]:
        """Returns the examples that stay in one row each: itself, or one for each segment."""
        if not self.apart:
            return [self]
        return [dataclasses.replace(self, segments=(segment,), apart=False) for segment in self.segments]


@dataclasses.dataclass(frozen=True)
class ExampleEncoder:
    """Encodes examples for an objective; picklable.

    Attributes:
      encode: the tokenizer's encoder.
      template: for conversations, or None.
      objective: the run's.
      seq_len: tokens per row.
      too_long: as in `DataConfig`.
    """

    encode: Encoder
    template: ChatTemplate | None
    objective: Objective
    seq_len: int
    too_long: TooLong

    def __call__(self, example: Example) -> EncodedExample:
        """Encodes an example.

        Raises:
          BadRecord: if it cannot be trained on, a TooLongRecord if it does not fit into a row.
          DataError: for a conversation without a template.
        """
        try:
            encoded = self._encoded(example)
        except InputError as error:
            raise BadRecord("refused conversation", str(error)) from None
        except TokenizerError as error:
            raise BadRecord("template failed", str(error)) from None
        segments = encoded.segments
        learned = [segment for segment in segments if segment.mask.any()]
        if len(learned) < len(segments) and len(encoded) <= self.room:
            raise BadRecord("nothing to train on", "no token of the example is trained on")
        if encoded.apart:
            return dataclasses.replace(encoded, segments=tuple(self._truncate_each(segments)))
        segments = self._truncate(segments)
        if len(segments) == 2 and np.array_equal(segments[0].ids, segments[1].ids):
            raise BadRecord("identical answers", "chosen and rejected are encoded as the same tokens")
        return dataclasses.replace(encoded, segments=segments)

    @property
    def room(self) -> int:
        """The most tokens of an example."""
        return self.seq_len // 2 if self.objective == "kto" else self.seq_len

    def _encoded(self, example: Example) -> EncodedExample:
        encode = SideEncoder(self.encode, self.template, self.objective, self.seq_len)
        try:
            sides = list(map(encode, example.sides))
        except TokenizerError:  # retry: a template timeout on a busy machine must not change the batches
            sides = list(map(encode, example.sides))
        segments = [
            Segment(np.array(ids, np.int32), np.array(mask, np.int32))
            for sequences, _ in sides
            for ids, mask in sequences
        ]
        notes = dict.fromkeys(note for _, notes in sides for note in notes)
        apart = len(segments) > len(example.sides)
        if self.objective in PAIR_OBJECTIVES and PROMPT_DIFFERS in notes:  # as in TRL, both from one token on
            starts = [int(segment.mask.argmax()) for segment in segments]
            for segment, start in zip(segments, starts, strict=True):
                segment.mask[min(starts) : start] = 1
        return EncodedExample(tuple(segments), example.value, apart=apart, notes=tuple(notes))

    def _truncate_each(self, segments: tuple[Segment, ...]) -> Iterator[Segment]:
        """Yields the segments that fit into a row, truncated if `too_long` allows it.

        Raises:
          TooLongRecord: if none does, or `too_long` is "fail" and one does not.
        """
        bad, found = TooLongRecord("too long", "no turn fits"), False
        for segment in segments:
            try:
                (fitting,) = self._truncate((segment,))
            except TooLongRecord as error:
                bad = error
                if self.too_long == "fail":
                    break
                continue
            found = True
            yield fitting
        else:
            if found:
                return
        raise bad

    def _truncate(self, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        """Truncates segments to fit into a row, if `too_long` allows it."""
        length = sum(map(len, segments))
        if length <= self.room:
            return segments
        details = f"{length} tokens, and train.seq_len is {self.seq_len}"
        if self.room < self.seq_len:
            details += ", half of which is for its prompt with another completion"
        if self.too_long != "truncate":
            raise TooLongRecord("too long", details)
        answer_starts = [
            int(segment.mask.argmax()) if self.objective in (*PAIR_OBJECTIVES, "kto") else 0
            for segment in segments
        ]
        room = self.room - sum(answer_starts)
        if room < len(segments):
            raise TooLongRecord("too long", f"{details}; the prompt leaves no room for an answer")
        sizes = [len(segment) - start for segment, start in zip(segments, answer_starts, strict=True)]
        share = room // len(segments)
        max_answer = max(share, room - min(sizes)) if len(sizes) > 1 else share
        cut = tuple(
            self._cut(segment, answer_start + min(size, max_answer))
            for segment, answer_start, size in zip(segments, answer_starts, sizes, strict=True)
        )
        if not all(segment.mask.any() for segment in cut):
            raise TooLongRecord("too long", f"{details}; truncation leaves nothing to train on")
        if len(cut) == 2 and np.array_equal(cut[0].ids, cut[1].ids):
            raise TooLongRecord("too long", f"{details}; the answers are the same after truncation")
        return cut

    def _cut(self, segment: Segment, end: int) -> Segment:
        mask = segment.mask[:end]
        if self.objective in ("classify", "regress"):
            mask = np.append(mask[1:], np.int32(1))
        return Segment(segment.ids[:end], mask)


class ExampleSource(RecordSource):
    """The examples of one source, encoded on access.

    Attributes:
      record_format: the name of the format of its records.
      seq_len: tokens per row.
    """

    def __init__(
        self, config: SourceConfig, records: Records, formats: RecordFormats, encode: ExampleEncoder
    ):
        template = encode.template and [encode.template.source, dict(encode.template.tokens)]
        super().__init__(records, config.field, dataclasses.astuple(formats), template, encode.too_long)
        self.record_format = ""
        self.seq_len = encode.seq_len
        self._formats = formats
        self._encode = encode

    def detect_format(self, skip_bad: bool) -> None:
        """Sets `record_format` from the first readable record.

        Raises:
          BadRecord: if it has no format that the objective accepts.
        """
        for index in range(len(self)):
            try:
                row = self.records.row(index)
            except BadRecord:
                if not skip_bad:
                    raise
                continue
            try:
                self.record_format = self._formats.detect(row)
            except BadRecord as bad:
                raise BadRecord(bad.reason, f"{self.records.location(index)}: {bad.message}") from None
            self.records.select(self._formats.columns(self.record_format))
            return

    def example(self, index: int) -> EncodedExample:
        """Returns one example.

        Raises:
          BadRecord: if its record cannot be used.
          DataError: if its file cannot be read.
        """
        row = self.records.row(index)
        try:
            return self._encode(self._formats.read(self.record_format, row))
        except (BadRecord, RecursionError) as error:
            too_deep = BadRecord("malformed message", "its values are nested too deeply")
            bad = error if isinstance(error, BadRecord) else too_deep
            bad.has_location = False
            raise bad from None

    def sides(self, index: int) -> tuple[Side, ...]:
        """Returns the sides of one record's example; none if it cannot be used."""
        try:
            return self._formats.read(self.record_format, self.records.row(index)).sides
        except (BadRecord, RecursionError):
            return ()

    def located_message(self, bad: BadRecord, index: int) -> str:
        """Returns the message of a bad record, with its location."""
        return bad.message if bad.has_location else f"{self.records.location(index)}: {bad.message}"


class Examples:
    """Random access to some of a source's examples, or the reason a record is unusable."""

    def __init__(
        self,
        source: ExampleSource,
        index: Sequence[int] | np.ndarray,
        skip_bad: bool,
        too_long: TooLong,
        reference: np.ndarray | None = None,
    ):
        """`reference` is f32 [records, 2]: `EncodedExample.reference`, NaN to skip a record."""
        self._reference = reference
        self._source = source
        self._index = index
        self._skip_bad = skip_bad
        self._too_long = too_long

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> EncodedExample | str:
        index = int(self._index[i])
        try:
            example = self._source.example(index)
        except TooLongRecord as bad:
            if self._too_long != "fail":
                return bad.reason
            raise DataError(
                f"{self._source.located_message(bad, index)}; shorten it, raise train.seq_len, or set "
                'data.too_long = "drop"'
            ) from None
        except BadRecord as bad:
            if self._skip_bad:
                return bad.reason
            raise DataError(bad_record_error(self._source.located_message(bad, index))) from None
        if self._reference is None:
            return example
        if np.isnan(self._reference[index]).any():
            return "no reference"
        return dataclasses.replace(example, reference=tuple(self._reference[index].tolist()))

    def __repr__(self) -> str:
        return f"Examples({len(self)})"
