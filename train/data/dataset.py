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
from .control_tokens import control_token_notes
from .encode import Encoder
from .examples import EncodedExample, Examples, ExampleSource
from .lanes import LaneBatches, LaneDocuments, Mixture, State
from .order import infinite_order
from .packing import pack_examples, packed_row, segment_ends
from .parts import Part, no_text_message
from .sharing import ALONE, Cost, Peers, encoded_once
from .source import TrainDocuments
from .validation import ValidationSet

_SAMPLE = 200  # examples that `describe` encodes
FINGERPRINT = "2:"  # begins the fingerprints of this version
_EXTRA_PATIENCE = 1000  # consecutive unusable records, on top of one epoch, before a lane raises


class Data:
    """What `open_data` returns.

    Attributes:
      fingerprint: a hash of everything that determines the batches, except the seed, the batch size and the
        sequence length: text, file names, vocabulary, weights, split. Text and JSON were hashed completely
        when they were indexed; other formats are hashed by size and samples.
      validation: the validation set.
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
        peers: Peers = ALONE,
    ):
        """See `open_data`. `validation_parts` are used for validation only.

        Raises:
          DataError: if there is too little text to train on.
        """
        self._config = config
        self._objective = objective
        self._validation_parts = validation_parts
        self._parts = parts
        self._encode = encode
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._local_rows = local_rows
        self._peers = peers
        self.fingerprint = FINGERPRINT + self._hash([part.source.fingerprint for part in parts])
        self.validation = ValidationSet(
            self._all_parts,
            self._documents,
            encode,
            objective=objective,
            seq_len=seq_len,
            batch_size=batch_size,
            local_rows=local_rows,
            peers=peers,
        )
        self._check_enough()

    def is_of(self, fingerprint: str) -> bool:
        """Returns whether a fingerprint is that of this data, also one that an earlier version recorded.

        Then text, JSON and CSV are read as a whole, once: those versions hashed them in one piece.
        """
        if fingerprint.startswith(FINGERPRINT):
            return fingerprint == self.fingerprint
        return fingerprint == self._hash([part.source.earlier_fingerprint() for part in self._parts])

    def _hash(self, fingerprints: Sequence[str]) -> str:
        weights = [float(part.config.weight) for part in self._parts]
        inputs: list[Any] = [
            self._encode.fingerprint,
            float(self._config.source_validation_fraction),
            self._config.shuffle,
            [list(pair) for pair in zip(fingerprints, weights, strict=True)],
        ]
        serialized = json.dumps(inputs if self._objective == "pretrain" else [*inputs, self._objective])
        return hashlib.blake2b(serialized.encode(), digest_size=16).hexdigest()

    def train(self) -> Batches:
        """Returns this process's rows of the training batches, starting with the first step."""
        mixture = self._mixture(self._seed)

        def make_lane_batches(lanes: range, states: Mapping[str, State] | None) -> LaneBatches:
            whole_examples = self._objective != "pretrain"
            return LaneBatches(
                mixture,
                lanes,
                self._batch_size,
                self._seq_len,
                states,
                whole_examples=whole_examples,
                separators=self._encode.separators,
            )

        return Batches(self._local_rows, self._batch_size, self._config.workers, make_lane_batches)

    @property
    def validation_sources(self) -> dict[str, float]:
        """The sources with validation records, by their `files`, and their shares of the eval_loss."""
        return self.validation.sources

    @property
    def validation_skipped(self) -> collections.Counter[str]:
        """Count of the examples that `validation_batches` skipped so far, by reason."""
        return self.validation.skipped

    def validation_batches(self, source: str | None = None) -> Iterator[dict[str, Any]]:
        """Yields this process's rows of the validation batches: the same ones every time.

        Every token of the validation documents, except each one's first, is predicted exactly once. For
        finetuning, every validation example appears once, uncut. They are encoded once, each record by one
        of the processes, which must all take the same batches, and kept.

        Args:
          source: one of `validation_sources`; None is all of them, one after the other.

        Yields:
          The arrays of a training batch; and `bytes`, int: the UTF-8 length of the GLOBAL batch's predicted
          text, for bits per byte. For examples it is the text that is trained on.
        """
        return self.validation.batches(source)

    @property
    def records(self) -> int:
        """Number of records of all sources, validation included."""
        return sum(len(part.source) for part in self._all_parts)

    @property
    def pairs_fingerprint(self) -> str:
        """A hash of everything that determines what `pairs` yields, except its order."""
        sources = [part.source.fingerprint for part in self._all_parts]
        serialized = json.dumps([self._encode.fingerprint, self._seq_len, self._objective, sources])
        return hashlib.blake2b(serialized.encode(), digest_size=16).hexdigest()

    def pairs(self) -> Iterator[dict[str, Any]]:
        """Yields this process's rows of batches with every usable record of pairs or labels once.

        Yields:
          The arrays of a training batch, and int32 `place`: 1 + 2 r + s at the last token of segment s of
          record r, where records are numbered across all sources; 0 elsewhere.
        """

        def items(part: Part) -> Iterator[Any]:
            records = self._documents(part, range(len(part.source)))
            return encoded_once(len(records), records.__getitem__, self._peers, Cost())

        def usable() -> Iterator[tuple[EncodedExample, int]]:
            for record, item in enumerate(itertools.chain.from_iterable(map(items, self._all_parts))):
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
        """Returns the same data with `reference` in its batches; see `packed_row`.

        Args:
          logprobs: f32 [records, 2], the reference model's log-probabilities of the answers in a record's
            two segments; a record with NaN is skipped.
        """
        boundaries = np.cumsum([len(part.source) for part in self._all_parts])[:-1]
        data = copy.copy(self)
        parts = [
            dataclasses.replace(part, reference=reference)
            for part, reference in zip(self._all_parts, np.split(logprobs, boundaries), strict=True)
        ]
        data._parts, data._validation_parts = parts[: len(self._parts)], parts[len(self._parts) :]
        data.validation = self.validation.of(parts)
        return data

    def location(self, record: int) -> str:
        """Returns the file and line of a record, numbered across all sources, for messages."""
        for part in self._all_parts:
            if isinstance(part.source, ExampleSource) and record < len(part.source):
                return part.source.records.location(record)
            record -= len(part.source)
        raise IndexError(record)

    @property
    def _all_parts(self) -> list[Part]:
        return [*self._parts, *self._validation_parts]

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
        means = []
        for name, share in self.validation_sources.items():
            limit = None if batches is None else evaluation.batches_of(batches, share)
            counts = self.validation.token_counts(name, limit)
            means.append((evaluation.unigram_loss(logprobs, counts), share))
        return evaluation.weighted_mean(means)

    def describe(self) -> dict[str, Any]:
        """Returns counts of documents and bytes, in total and by source; JSON-serializable.

        For finetuning also `sample`, statistics of the first examples of each source: the number of usable
        `examples`, of their `tokens` and of tokens that are trained on (`learned`), the length of the
        `longest` example, and the `skipped` ones by reason.

        `notes` are sentences on what the first records have, such as control tokens.

        Raises:
          DataError: if one of those records is bad and `data.bad_records` is "fail".
        """
        sources: list[dict[str, Any]] = [
            {
                "files": part.config.title,
                "documents": len(part.source),
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
        notes = control_token_notes(self._parts, self._encode, _SAMPLE)
        sample = {}
        if self._objective != "pretrain":
            sample["sample"], counts = self._sample()
            notes += [f"in {count} of the first examples {note}" for note, count in counts.items()]
        return {**totals, "sources": sources, **sample, "notes": notes}

    def _sample(self) -> tuple[dict[str, Any], collections.Counter[str]]:
        """Returns statistics of the first examples, and counts of their notes."""
        skipped: collections.Counter[str] = collections.Counter()
        notes: collections.Counter[str] = collections.Counter()
        lengths: list[int] = []
        learned = 0
        for part in self._parts:
            for item in itertools.islice(
                self._usable(part, part.train_index), _SAMPLE // len(self._parts) + 1
            ):
                if isinstance(item, EncodedExample):
                    lengths += map(len, item.parts())
                    trained = item.segments[: 1 if self._objective == "kto" else None]
                    learned += sum(int(segment.mask.sum()) for segment in trained)
                    notes.update(item.notes)
                else:
                    skipped[str(item)] += 1
        statistics = {
            "examples": len(lengths),
            "tokens": sum(lengths),
            "learned": learned,
            "longest": max(lengths, default=0),
            "skipped": dict(skipped),
        }
        return statistics, notes

    def _usable(
        self, part: Part, index: Sequence[int] | np.ndarray
    ) -> Iterator[np.ndarray | EncodedExample | str]:
        """Yields the document or example of each record, or the reason it is unusable."""
        documents = self._documents(part, index)
        return map(documents.__getitem__, range(len(documents)))

    def _documents(self, part: Part, index: Sequence[int] | np.ndarray) -> TrainDocuments | Examples:
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

    def _check_enough(self) -> None:
        """Raises DataError unless each source has text, and all of them together fill one sequence.

        For finetuning one example per source is enough, since rows are padded. The first validation records
        are read too, each by one of the processes: a bad one would end the run at its first evaluation.
        """
        for part in self._all_parts:
            first = part.validation_index[:_SAMPLE][self._peers.index :: self._peers.count]
            collections.deque(self._usable(part, first), maxlen=0)
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
