"""A run's data as a whole: what is trained on, mixed, and what is held out."""

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
from .examples import Examples, ExampleSource, Unit
from .lanes import LaneBatches, LaneDocuments, Mixture, State, TrainDocuments, endless
from .packing import ends, grouped, packed_row, packed_rows
from .parts import Part, empty
from .records import BadRecord, refusal
from .source import Document

_SAMPLE = 200  # examples that `describe` looks at
_SPARE_TURNS = 1000  # unusable records in a row, beyond as many as there are, before a lane gives up


class Data:
    """What `open_data` returns.

    Attributes:
      fingerprint: a hash of everything but the seed, the batch size and the sequence length that decides
        the batches: text, file names, vocabulary, weights, split. Text formats are hashed whole; Parquet and
        ArrayRecord files by their sizes and samples.
      held_out_skipped: examples that the last pass of `held_out` left out, by reason.
    """

    def __init__(
        self,
        config: DataConfig,
        parts: list[Part],
        apart: list[Part],
        encode: Encoder,
        *,
        objective: Objective,
        seq_len: int,
        batch_size: int,
        seed: int,
        mine: range,
    ):
        """Checks that there is enough; `apart` are parts of which all is held out. See `open_data`."""
        self._config = config
        self._objective = objective
        self._apart = apart
        self.held_out_skipped: collections.Counter[str] = collections.Counter()
        self._parts = parts
        self._encode = encode
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._mine = mine
        said = [[part.source.fingerprint, float(part.config.weight)] for part in parts]
        parts_of_it: list[Any] = [encode.fingerprint, float(config.share), config.shuffle, said]
        decides = json.dumps(parts_of_it if objective == "pretrain" else [*parts_of_it, objective])
        self.fingerprint = hashlib.blake2b(decides.encode(), digest_size=16).hexdigest()
        self._check_enough()

    def train(self) -> Batches:
        """Returns this process's rows of the training batches, from the first step on."""
        mixture = self._mixture(self._seed)

        def make(lanes: range, states: Mapping[str, State] | None) -> LaneBatches:
            whole = self._objective != "pretrain"
            return LaneBatches(mixture, lanes, self._batch_size, self._seq_len, states, whole=whole)

        return Batches(self._mine, self._batch_size, self._config.workers, make)

    def held_out(self) -> Iterator[dict[str, Any]]:
        """Yields this process's rows of the held-out batches: the same ones every time.

        Every token of the held-out documents but each one's first is predicted exactly once, if a model
        predicts a row's tokens from those before them in their segment. For finetuning it is each held-out
        example, whole, once.

        Yields:
          The arrays of a training batch; and `bytes`, a whole number: how much text the predictions of the
          GLOBAL batch spell, for bits per byte. Of examples it is the text that is learned.
        """
        if self._objective == "pretrain":
            rows = evaluation.pack(self._held_out_documents(), self._seq_len)
        else:
            rows = packed_rows(map(self._with_bytes, self._held_out_examples()), self._seq_len)
        return evaluation.batches(rows, self._batch_size, self._mine)

    @property
    def records(self) -> int:
        """How many records all sources have, those held out too."""
        return sum(len(part.source.key) for part in self._all)

    @property
    def pairs_fingerprint(self) -> str:
        """A hash of all that decides what `pairs` yields but for its order."""
        sources = [part.source.fingerprint for part in self._all]
        said = json.dumps([self._encode.fingerprint, self._seq_len, self._objective, sources])
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    def pairs(self) -> Iterator[dict[str, Any]]:
        """Yields this process's rows of batches that hold every usable example of all records once.

        Yields:
          The arrays of a training batch, and int32 `place`: 1 + 2 r + s at the last token of segment s of
          record r, numbered through all sources; elsewhere 0.
        """

        def usable() -> Iterator[tuple[Unit, int]]:
            indices = (self._usable(part, np.arange(len(part.source.key))) for part in self._all)
            for record, item in enumerate(itertools.chain.from_iterable(indices)):
                if isinstance(item, Unit):
                    yield item, record

        def row(items: Sequence[tuple[Unit, int]]) -> dict[str, Any]:
            units = [unit for unit, _ in items]
            place = np.zeros(self._seq_len, np.int32)
            place[ends(units)] = [1 + 2 * record + side for _, record in items for side in (0, 1)]
            return {**packed_row(units, self._seq_len), "place": place, "bytes": 0}

        return evaluation.batches(map(row, grouped(usable(), self._seq_len)), self._batch_size, self._mine)

    def with_reference(self, logprobs: np.ndarray) -> Data:
        """Returns the same data, of pairs, whose batches carry `reference` as well; see `packed_row`.

        Args:
          logprobs: f32 [records, 2], of each record's chosen and rejected answer; NaN leaves a record out.
        """
        cuts = np.cumsum([len(part.source.key) for part in self._all])[:-1]
        made = copy.copy(self)
        parts = [
            dataclasses.replace(part, reference=numbers)
            for part, numbers in zip(self._all, np.split(logprobs, cuts), strict=True)
        ]
        made._parts, made._apart = parts[: len(self._parts)], parts[len(self._parts) :]
        return made

    def where(self, record: int) -> str:
        """Returns where a record is, numbered through all sources; for people."""
        for part in self._all:
            if isinstance(part.source, ExampleSource) and record < len(part.source.key):
                return part.source.records.where(record)
            record -= len(part.source.key)
        raise IndexError(record)

    @property
    def _all(self) -> list[Part]:
        return [*self._parts, *self._apart]

    def _with_bytes(self, unit: Unit) -> tuple[Unit, int]:
        learned = (segment.ids[segment.mask > 0] for segment in unit.segments)
        return unit, sum(len(self._encode.tokenizer.decode(ids).encode()) for ids in learned)

    def unigram_loss(self, most: int = 1_000_000) -> float:
        """Nats a token on the held-out tokens of a unigram model with add-one smoothing.

        NaN where nothing is held out, and for finetuning, of which it says nothing.

        Args:
          most: how many training tokens it counts, from the head of one shuffled epoch.
        """
        if self._objective != "pretrain":
            return float("nan")
        mixture = self._mixture(0)
        drawn = itertools.islice(LaneDocuments(mixture, 0, 1), sum(len(part.train) for part in self._parts))
        train = (document["tokens"] for document in drawn)
        test = (document.ids for document in self._held_out_documents())
        return evaluation.unigram_loss(train, test, self._encode.vocab_size, most)

    def describe(self) -> dict[str, Any]:
        """Returns counts of documents and bytes, in all and by source; JSON-able.

        For finetuning also `sample`, of the first examples of the sources: how many `examples` and `tokens`
        of theirs are used, how many tokens are `learned`, the `longest`, and the `skipped`, by reason.

        Raises:
          DataError: if one of those cannot be used, and bad records are not to be skipped.
        """
        sources: list[dict[str, Any]] = [
            {
                "files": part.config.files,
                "documents": len(part.source.key),
                "held_out_documents": len(part.held_out),
                "bytes": part.source.nbytes,
                "weight": part.config.weight,
            }
            for part in self._all
        ]
        totals = {
            name: sum(source[name] for source in sources)
            for name in ("documents", "held_out_documents", "bytes")
        }
        sample = {} if self._objective == "pretrain" else {"sample": self._sample()}
        return {**totals, "sources": sources, **sample}

    def _sample(self) -> dict[str, Any]:
        skipped: collections.Counter[str] = collections.Counter()
        lengths, learned = [], 0
        for part in self._parts:
            for item in itertools.islice(self._usable(part, part.train), _SAMPLE // len(self._parts) + 1):
                if isinstance(item, Unit):
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

    def _usable(self, part: Part, index: np.ndarray) -> Iterator[np.ndarray | Unit | str]:
        """Yields some of a source's documents or examples, or the reasons why there are none."""
        documents = self._documents(part, index)
        return map(documents.__getitem__, range(len(documents)))

    def _documents(self, part: Part, index: np.ndarray) -> TrainDocuments | Examples:
        skip = self._config.bad_records == "skip"
        if isinstance(part.source, ExampleSource):
            return Examples(part.source, index, skip, self._config.too_long, part.reference)
        return TrainDocuments(part.source, index, skip)

    def _mixture(self, seed: int) -> Mixture:
        orders = [
            endless(
                self._documents(part, part.train),
                part.blocks,
                f"{seed}/{i}" if self._config.shuffle else None,
            )
            for i, part in enumerate(self._parts)
        ]
        patience = sum(len(part.train) for part in self._parts) + _SPARE_TURNS
        return Mixture(orders, [part.config.weight for part in self._parts], patience)

    def _held_out_documents(self) -> Iterator[Document]:
        for part in self._all:
            if isinstance(part.source, ExampleSource):
                continue
            for index in part.held_out.tolist():
                try:
                    yield part.source.document(index)
                except BadRecord as bad:
                    if self._config.bad_records == "fail":
                        raise DataError(refusal(bad.message)) from None

    def _held_out_examples(self) -> Iterator[Unit]:
        self.held_out_skipped.clear()
        for part in self._all:
            for item in self._usable(part, part.held_out):
                if isinstance(item, Unit):
                    yield item
                else:
                    self.held_out_skipped[str(item)] += 1

    def _check_enough(self) -> None:
        """Raises DataError unless each source has text, and all of them fill one sequence.

        For finetuning one example of each is enough: rows are padded.
        """
        total = 0
        for part in self._parts:
            found = 0
            skipped: collections.Counter[str] = collections.Counter()
            for item in self._usable(part, part.train):
                if isinstance(item, str):
                    skipped[item] += 1
                    continue
                found += len(item)
                if total + found >= self._seq_len or (found and self._objective != "pretrain"):
                    break
            if not found:
                raise DataError(empty(part, self._config, skipped))
            total += found
        if total < self._seq_len and self._objective == "pretrain":
            count = sum(len(part.train) for part in self._parts)
            raise DataError(
                f"the data holds {total} tokens to train on ({count} documents), and one sequence takes "
                f"{self._seq_len}; add text, or set train.seq_len to at most {total}"
            )
