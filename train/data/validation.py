"""The validation set of a run: encoded once, by all processes together, and kept."""

from __future__ import annotations

import collections
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..config.objective import Objective
from . import evaluation
from .encode import Document, Encoder
from .examples import EncodedExample, Examples
from .packing import packed_rows
from .parts import Part
from .sharing import ALONE, Cost, Peers, encoded_once
from .source import TrainDocuments

Open = Callable[[Part, Sequence[int] | np.ndarray], TrainDocuments | Examples]


class ValidationSet:
    """The validation records of all sources.

    Attributes:
      parts: the sources.
      skipped: count of the examples that were skipped, by reason, as far as batches were taken.
      cost: what encoding took this process, as far as batches were taken.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        open_records: Open,
        encode: Encoder,
        *,
        objective: Objective,
        seq_len: int,
        batch_size: int,
        local_rows: range,
        peers: Peers,
    ):
        """`open_records` gives random access to a part's documents or examples; see `Data`."""
        self.parts = parts
        self.skipped: collections.Counter[str] = collections.Counter()
        self.cost = Cost()
        self._open = open_records
        self._encode = encode
        self._objective = objective
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._local_rows = local_rows
        self._peers = peers
        self._kept: dict[str | None, _Kept] = {}

    def of(self, parts: Sequence[Part]) -> ValidationSet:
        """Returns the validation set of other parts, of which nothing is kept yet."""
        other = copy.copy(self)
        other.parts, other._kept = parts, {}
        other.skipped, other.cost = collections.Counter(), Cost()
        return other

    @property
    def sources(self) -> dict[str, float]:
        """The sources with validation records, by their `files`, and their shares of the eval_loss."""
        weights: dict[str, float] = {}
        for part in self.parts:
            if len(part.validation_index):
                weights[part.config.title] = weights.get(part.config.title, 0.0) + part.config.weight
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    @property
    def nbytes(self) -> int:
        """The memory that the batches taken so far are kept in."""
        return sum(kept.nbytes for kept in self._kept.values())

    def batches(self, source: str | None = None) -> Iterator[dict[str, Any]]:
        """Yields the batches of a source, or of all; see `Data.validation_batches`."""
        if source not in self._kept:
            self._kept[source] = _Kept(
                self._rows(source), self._batch_size, self._local_rows, self._encode.vocab_size
            )
        return iter(self._kept[source])

    def token_counts(self, source: str, batches: int | None) -> np.ndarray:
        """Returns how often each token is predicted in a source's first batches, int64 [V].

        Without the other processes: what they have not already taken part in is encoded by this one alone.
        """
        key = source if source in self._kept or len(self.sources) > 1 else None
        kept = self._kept.get(key)
        if kept is not None and (
            kept.count == batches or (kept.complete and (batches is None or batches > kept.count))
        ):
            return kept.token_counts
        rows = self._rows(source, ALONE, Cost())
        limit = None if batches is None else batches * self._batch_size
        return evaluation.token_counts(itertools.islice(rows, limit), self._encode.vocab_size)

    def _rows(
        self, source: str | None, peers: Peers | None = None, cost: Cost | None = None
    ) -> Iterator[dict[str, Any]]:
        parts = [part for part in self.parts if source in (None, part.config.title)]
        items = itertools.chain.from_iterable(
            self._items(part, peers or self._peers, cost or self.cost) for part in parts
        )
        if self._objective == "pretrain":
            return evaluation.pack_documents(items, self._seq_len)
        return packed_rows(items, self._seq_len)

    def _items(self, part: Part, peers: Peers, cost: Cost) -> Iterator[Any]:
        """Yields a part's documents, or its examples with the number of bytes that are trained on."""
        records = self._open(part, part.validation_index)
        if isinstance(records, Examples):
            for item in encoded_once(len(records), records.__getitem__, peers, cost):
                if isinstance(item, EncodedExample):
                    yield from map(self._with_bytes, item.parts())
                else:
                    self.skipped[item] += 1
            return
        for document in encoded_once(len(records), records.document, peers, cost):
            if isinstance(document, Document):
                yield from evaluation.split_document(document, self._encode.separators)

    def _with_bytes(self, example: EncodedExample) -> tuple[EncodedExample, int]:
        learned = (segment.ids[segment.mask > 0] for segment in example.segments)
        return example, sum(len(self._encode.tokenizer.decode(ids).encode()) for ids in learned)


class _Kept:
    """Batches that are made once, and kept as small integers.

    Attributes:
      count: the number of batches that have been taken.
      complete: whether these are all.
      nbytes: the memory that they are kept in.
      token_counts: int64 [V], how often each token is predicted in the global batches.
    """

    def __init__(self, rows: Iterator[dict[str, Any]], batch_size: int, local_rows: range, vocab_size: int):
        self.count = self.nbytes = 0
        self.complete = False
        self.token_counts = np.zeros(vocab_size, np.int64)
        self._batches: list[dict[str, Any]] = []
        self._more = evaluation.global_batches(map(self._counted, rows), batch_size, local_rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in itertools.count():
            if i == self.count and not self._take():
                return
            yield {name: _widened(x) for name, x in self._batches[i].items()}

    def _take(self) -> bool:
        batch = next(self._more, None)
        if batch is None:
            self.complete = True
            return False
        small = {name: _narrowed(x) for name, x in batch.items()}
        self._batches.append(small)
        self.count += 1
        self.nbytes += sum(x.nbytes for x in small.values() if isinstance(x, np.ndarray))
        return True

    def _counted(self, row: dict[str, Any]) -> dict[str, Any]:
        self.token_counts += evaluation.token_counts([row], len(self.token_counts))
        return row


def _narrowed(x: Any) -> Any:
    if isinstance(x, np.ndarray) and x.dtype == np.int32:
        return x.astype(np.min_scalar_type(int(x.max(initial=0))))
    return x


def _widened(x: Any) -> Any:
    return x.astype(np.int32) if isinstance(x, np.ndarray) and x.dtype.kind in "iu" else x
