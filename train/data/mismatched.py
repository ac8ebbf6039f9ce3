"""KTO's mismatched segments: an example's prompt with the completion of another example.

The loss compares rewards with the KL divergence of policy and reference model, which it estimates on
completions that have nothing to do with their prompts (arXiv 2402.01306, section 4.2). TRL takes the
completion of the previous example of the batch. Here it is that of a record before it in the files, so that
it depends neither on the batch nor on packing, and its reference log-probability can be computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from .examples import EncodedExample, ExampleSource, Segment
from .records import BadRecord

REACH = 8  # how many records before an example are searched for another prompt


class MismatchedSource(ExampleSource):
    """The examples of one source, each with a mismatched segment."""

    def example(self, index: int) -> EncodedExample:
        """Returns one example, see `with_mismatched`.

        Raises:
          BadRecord: if its record cannot be used.
          DataError: if its file cannot be read.
        """
        own = super().example
        return with_mismatched(own(index), index, len(self), own, self.seq_len)


def with_mismatched(
    example: EncodedExample, index: int, records: int, read: Callable[[int], EncodedExample], seq_len: int
) -> EncodedExample:
    """Adds a segment with the completion of the nearest usable record before it that has another prompt.

    The last record is before the first. If none of `REACH` records is such, it is the nearest one's
    completion, or without one the example's own. It is truncated where the example would not fit into a row.

    Args:
      example: one segment.
      index: its record.
      records: the number of records.
      read: returns the example of a record, or raises BadRecord.
      seq_len: tokens per row.

    Returns:
      The example with two segments: its own, and the mismatched one.
    """
    (segment,) = example.segments
    prompt = segment.ids[: _prompt_length(segment)]
    other = None
    for distance in range(1, min(REACH, records - 1) + 1):
        try:
            (found,) = read((index - distance) % records).segments
        except BadRecord:  # which stops the run, or is counted, in its own place
            continue
        if not np.array_equal(prompt, found.ids[: _prompt_length(found)]):
            other = found
            break
        other = found if other is None else other
    other = segment if other is None else other
    start, room = _prompt_length(other), seq_len - len(segment)
    mismatched = Segment(
        np.concatenate([prompt, other.ids[start:]])[:room],
        np.concatenate([np.zeros_like(prompt), other.mask[start:]])[:room],
    )
    return dataclasses.replace(example, segments=(segment, mismatched))


def _prompt_length(segment: Segment) -> int:
    return int(segment.mask.argmax())
