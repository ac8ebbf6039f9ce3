"""A run's data: the training mixture and the validation set."""

from __future__ import annotations

import collections
import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.errors import DataError

from ..config.data import DataConfig
from ..config.objective import Objective
from . import evaluation
from .batches import Batches
from .encode import Encoder
from .examples import EncodedExample, Examples, ExampleSource
from .lanes import LaneBatches, LaneDocuments, Mixture, State, TrainDocuments, infinite_order
from .packing import pack_examples, packed_row, packed_rows, segment_ends
from .parts import Part, no_text_message
from .records import BadRecord, bad_record_error
from .source import Document

_SAMPLE = 200  # examples that `describe` encodes
_EXTRA_PATIENCE = 1000  # consecutive unusable records, on top of one epoch, before a lane raises


class Data:
    """What `open_data` returns.

    Attributes:
      fingerprint: a hash of everything that determines the batches, except the seed, the batch size and the
        sequence length: text, file names, vocabulary, weights, split. Text formats are hashed completely;
        Parquet and ArrayRecord files by size and samples.
      validation_skipped: count of the examples that the last pass of `validation_batches` skipped, by reason.
    """

    def __init__(
        self,
        config: DataConfig,
        parts: list[Part],
        validation_parts: list[Part],
        encode: Encoder,
        *,
        objective: Objective,
        seq_len: int,
        batch_size: int,
        seed: int,
        local_rows: range,
    ):
        """See `open_data`. `validation_parts` are used for validation only.

        Raises:
          DataError: if there is too little text to train on.
        """
        self._config = config
        self._objective = objective
        self._validation_parts = validation_parts
        self.validation_skipped: collections.Counter[str] = collections.Counter()
        self._parts = parts
        self._encode = encode
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._local_rows = local_rows
        sources = [[part.source.fingerprint, float(part.config.weight)] for part in parts]
        inputs: list[Any] = [
            encode.fingerprint,
            float(config.source_validation_fraction),
            config.shuffle,
            sources,
        ]
        serialized = json.dumps(inputs if objective == "pretrain" else [*inputs, objective])
        self.fingerprint = hashlib.blake2b(serialized.encode(), digest_size=16).hexdigest()
        self._check_enough()

    def train(self) -> Batches:
        """Returns this process's rows of the training batches, starting with the first step."""
        mixture = self._mixture(self._seed)

        def make_lane_batches(lanes: range, states: Mapping[str, State] | None) -> LaneBatches:
            whole_examples = self._objective != "pretrain"
            return LaneBatches(
                mixture, lanes, self._batch_size, self._seq_len, states, whole_examples=whole_examples
            )

        return Batches(self._local_rows, self._batch_size, self._config.workers, make_lane_batches)

    @property
    def validation_sources(self) -> dict[str, float]:
        """The sources with validation records, by their `files`, and their shares of the eval_loss."""
        weights: dict[str, float] = {}
        for part in self._all_parts:
            if len(part.validation_index):
                weights[part.config.files] = weights.get(part.config.files, 0.0) + part.config.weight
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    def validation_batches(self, source: str | None = None) -> Iterator[dict[str, Any]]:
        """Yields this process's rows of the validation batches: the same ones every time.

        Every token of the validation documents, except each one's first, is predicted exactly once. For
        finetuning, every validation example appears once, uncut.

        Args:
          source: one of `validation_sources`; None is all of them, one after the other.

        Yields:
          The arrays of a training batch; and `bytes`, int: the UTF-8 length of the GLOBAL batch's predicted
          text, for bits per byte. For examples it is the text that is trained on.
        """
        if source in (None, next(iter(self.validation_sources), None)):  # a new pass
            self.validation_skipped.clear()
        return evaluation.global_batches(self._validation_rows(source), self._batch_size, self._local_rows)

    def _validation_rows(self, source: str | None = None) -> Iterator[dict[str, Any]]:
        parts = [part for part in self._all_parts if source in (None, part.config.files)]
        if self._objective == "pretrain":
            return evaluation.pack_documents(self._validation_documents(parts), self._seq_len)
        return packed_rows(map(self._with_bytes, self._validation_examples(parts)), self._seq_len)

    @property
    def records(self) -> int:
        """Number of records of all sources, validation included."""
        return sum(len(part.source.keys) for part in self._all_parts)

    @property
    def pairs_fingerprint(self) -> str:
        """A hash of everything that determines what `pairs` yields, except its order."""
        sources = [part.source.fingerprint for part in self._all_parts]
        serialized = json.dumps([self._encode.fingerprint, self._seq_len, self._objective, sources])
        return hashlib.blake2b(serialized.encode(), digest_size=16).hexdigest()

    def pairs(self) -> Iterator[dict[str, Any]]:
        """Yields this process's rows of batches that contain every usable pair of all records once.

        Yields:
          The arrays of a training batch, and int32 `place`: 1 + 2 r + s at the last token of segment s of
          record r, where records are numbered across all sources; 0 elsewhere.
        """

        def usable() -> Iterator[tuple[EncodedExample, int]]:
            indices = (self._usable(part, np.arange(len(part.source.keys))) for part in self._all_parts)
            for record, item in enumerate(itertools.chain.from_iterable(indices)):
                if isinstance(item, EncodedExample):
                    yield item, record

        def row(items: Sequence[tuple[EncodedExample, int]]) -> dict[str, Any]:
            examples = [example for example, _ in items]
            place = np.zeros(self._seq_len, np.int32)
            place[segment_ends(examples)] = [1 + 2 * record + side for _, record in items for side in (0, 1)]
            return {**packed_row(examples, self._seq_len), "place": place, "bytes": 0}

        return evaluation.global_batches(
            map(row, pack_examples(usable(), self._seq_len)), self._batch_size, self._local_rows
        )

    def with_reference(self, logprobs: np.ndarray) -> Data:
        """Returns the same data of pairs with `reference` in its batches; see `packed_row`.

        Args:
          logprobs: f32 [records, 2], the reference model's log-probabilities of each record's chosen and
            rejected answer; a record with NaN is skipped.
        """
        boundaries = np.cumsum([len(part.source.keys) for part in self._all_parts])[:-1]
        data = copy.copy(self)
        parts = [
            dataclasses.replace(part, reference=reference)
            for part, reference in zip(self._all_parts, np.split(logprobs, boundaries), strict=True)
        ]
        data._parts, data._validation_parts = parts[: len(self._parts)], parts[len(self._parts) :]
        return data

    def location(self, record: int) -> str:
        """Returns the file and line of a record, numbered across all sources, for messages."""
        for part in self._all_parts:
            if isinstance(part.source, ExampleSource) and record < len(part.source.keys):
                return part.source.records.location(record)
            record -= len(part.source.keys)
        raise IndexError(record)

    @property
    def _all_parts(self) -> list[Part]:
        return [*self._parts, *self._validation_parts]

    def _with_bytes(self, example: EncodedExample) -> tuple[EncodedExample, int]:
        learned = (segment.ids[segment.mask > 0] for segment in example.segments)
        return example, sum(len(self._encode.tokenizer.decode(ids).encode()) for ids in learned)

    def unigram_loss(self, batches: int | None = None, max_tokens: int = 1_000_000) -> float:
        """Returns the eval_loss of a unigram model with add-one smoothing, in nats per token.

        NaN without a validation set, and for finetuning, where it is not comparable.

        Args:
          batches: validation batches to predict, as in an evaluation; None for all.
          max_tokens: training tokens to count, from the start of one shuffled epoch.
        """
        if self._objective != "pretrain":
            return float("nan")
        mixture = self._mixture(0)
        documents = itertools.islice(
            LaneDocuments(mixture, 0, 1), sum(len(part.train_index) for part in self._parts)
        )
        train = (document["tokens"] for document in documents)
        logprobs = evaluation.unigram_logprobs(train, self._encode.vocab_size, max_tokens)
        shares = self.validation_sources
        return evaluation.weighted_mean(
            (
                evaluation.unigram_loss(logprobs, self._limited(self._validation_rows(name), batches, share)),
                share,
            )
            for name, share in shares.items()
        )

    def _limited(self, rows: Iterator[dict[str, Any]], batches: int | None, share: float) -> Iterator[Any]:
        if batches is None:
            return rows
        return itertools.islice(rows, evaluation.batches_of(batches, share) * self._batch_size)

    def describe(self) -> dict[str, Any]:
        """Returns counts of documents and bytes, in total and by source; JSON-serializable.

        For finetuning also `sample`, statistics of the first examples of each source: the number of usable
        `examples`, of their `tokens` and of tokens that are trained on (`learned`), the length of the
        `longest` example, and the `skipped` ones by reason.

        Raises:
          DataError: if one of those records is bad and `data.bad_records` is "fail".
        """
        sources: list[dict[str, Any]] = [
            {
                "files": part.config.files,
                "documents": len(part.source.keys),
                "validation_documents": len(part.validation_index),
                "bytes": part.source.nbytes,
                "weight": part.config.weight,
            }
            for part in self._all_parts
        ]
        totals = {
            name: sum(source[name] for source in sources)
            for name in ("documents", "validation_documents", "bytes")
        }
        sample = {} if self._objective == "pretrain" else {"sample": self._sample()}
        return {**totals, "sources": sources, **sample}

    def _sample(self) -> dict[str, Any]:
        skipped: collections.Counter[str] = collections.Counter()
        lengths, learned = [], 0
        for part in self._parts:
            for item in itertools.islice(
                self._usable(part, part.train_index), _SAMPLE // len(self._parts) + 1
            ):
                if isinstance(item, EncodedExample):
                    lengths.append(len(item))
                    learned += sum(int(segment.mask.sum()) for segment in item.segments)
                else:
                    skipped[str(item)] += 1
        return {
            "examples": len(lengths),
            "tokens": sum(lengths),
            "learned": learned,
            "longest": max(lengths, default=0),
            "skipped": dict(skipped),
        }

    def _usable(self, part: Part, index: np.ndarray) -> Iterator[np.ndarray | EncodedExample | str]:
        """Yields the document or example of each record, or the reason it is unusable."""
        documents = self._documents(part, index)
        return map(documents.__getitem__, range(len(documents)))

    def _documents(self, part: Part, index: np.ndarray) -> TrainDocuments | Examples:
        skip = self._config.bad_records == "skip"
        if isinstance(part.source, ExampleSource):
            return Examples(part.source, index, skip, self._config.too_long, part.reference)
        return TrainDocuments(part.source, index, skip)

    def _mixture(self, seed: int) -> Mixture:
        orders = [
            infinite_order(
                self._documents(part, part.train_index),
                part.blocks,
                f"{seed}/{i}" if self._config.shuffle else None,
            )
            for i, part in enumerate(self._parts)
        ]
        patience = sum(len(part.train_index) for part in self._parts) + _EXTRA_PATIENCE
        return Mixture(orders, [part.config.weight for part in self._parts], patience)

    def _validation_documents(self, parts: Sequence[Part]) -> Iterator[Document]:
        for part in parts:
            if isinstance(part.source, ExampleSource):
                continue
            for index in part.validation_index.tolist():
                try:
                    yield part.source.document(index)
                except BadRecord as bad:
                    if self._config.bad_records == "fail":
                        raise DataError(bad_record_error(bad.message)) from None

    def _validation_examples(self, parts: Sequence[Part]) -> Iterator[EncodedExample]:
        for part in parts:
            for item in self._usable(part, part.validation_index):
                if isinstance(item, EncodedExample):
                    yield item
                else:
                    self.validation_skipped[str(item)] += 1

    def _check_enough(self) -> None:
        """Raises DataError unless each source has text, and all of them together fill one sequence.

        For finetuning one example per source is enough, since rows are padded. The first validation records
        are read too: a bad one would end the run at its first evaluation.
        """
        for part in self._all_parts:
            collections.deque(itertools.islice(self._usable(part, part.validation_index), _SAMPLE), maxlen=0)
        total = 0
        for part in self._parts:
            found = 0
            skipped: collections.Counter[str] = collections.Counter()
            for item in self._usable(part, part.train_index):
                if isinstance(item, str):
                    skipped[item] += 1
                    continue
                found += len(item)
                if total + found >= self._seq_len or (found and self._objective != "pretrain"):
                    break
            if not found:
                raise DataError(no_text_message(part, self._config, skipped))
            total += found
        if total < self._seq_len and self._objective == "pretrain":
            count = sum(len(part.train_index) for part in self._parts)
            raise DataError(
                f"the data has {total} tokens to train on ({count} documents), and one sequence needs "
                f"{self._seq_len}; add text, or set train.seq_len to at most {total}"
            )
