"""A run's data as a whole: its sources opened, split, mixed, and checked."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llama_jax.errors import ConfigError, DataError
from llama_jax.tokenizer import Tokenizer
from train.data import evaluation
from train.data.batches import Batches
from train.data.config import DataConfig, SourceConfig
from train.data.encode import Encoder
from train.data.lanes import LaneBatches, LaneDocuments, Mixture, State, TrainDocuments, endless, refusal
from train.data.records import BadRecord, held_out, keys
from train.data.source import Document, Source, open_records, open_source

_SPARE_TURNS = 1000  # unusable records in a row, beyond as many as there are, before a lane gives up


@dataclasses.dataclass(frozen=True)
class _Part:
    """One source, split."""

    config: SourceConfig
    source: Source
    train: np.ndarray
    held_out: np.ndarray
    blocks: np.ndarray | None


class Data:
    """What `open_data` returns.

    Attributes:
      fingerprint: a hash of everything but the seed, the batch size and the sequence length that decides
        the batches: text, file names, vocabulary, weights, split. Text formats are hashed whole; Parquet and
        ArrayRecord files by their sizes and samples.
    """

    def __init__(
        self,
        config: DataConfig,
        parts: list[_Part],
        encode: Encoder,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        mine: range,
    ):
        self._config = config
        self._parts = parts
        self._encode = encode
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._seed = seed
        self._mine = mine
        said = [[part.source.fingerprint, float(part.config.weight)] for part in parts]
        decides = json.dumps([encode.fingerprint, float(config.held_out), config.shuffle, said])
        self.fingerprint = hashlib.blake2b(decides.encode(), digest_size=16).hexdigest()
        self._check_enough()

    def train(self) -> Batches:
        """Returns this process's rows of the training batches, from the first step on."""
        mixture = self._mixture(self._seed)

        def make(lanes: range, states: Mapping[str, State] | None) -> LaneBatches:
            return LaneBatches(mixture, lanes, self._batch_size, self._seq_len, states)

        return Batches(self._mine, self._batch_size, self._config.workers, make)

    def held_out(self) -> Iterator[dict[str, Any]]:
        """Yields this process's rows of the held-out batches: the same ones every time.

        Every token of the held-out documents but each one's first is predicted exactly once, if a model
        predicts a row's tokens from those before them in their segment.

        Yields:
          int32 [rows, seq_len] `tokens`, `segment_ids` (0 is padding) and `positions`; and `bytes`, a
          whole number: how much text the predictions of the GLOBAL batch spell, for bits per byte.
        """
        rows = evaluation.pack(self._held_out_documents(), self._seq_len)
        return evaluation.batches(rows, self._batch_size, self._seq_len, self._mine)

    def unigram_loss(self, most: int = 1_000_000) -> float:
        """Nats a token on the held-out tokens of a unigram model with add-one smoothing.

        Args:
          most: how many training tokens it counts, from the head of one shuffled epoch.
        """
        mixture = self._mixture(0)
        drawn = itertools.islice(LaneDocuments(mixture, 0, 1), sum(len(part.train) for part in self._parts))
        train = (document["tokens"] for document in drawn)
        test = (document.ids for document in self._held_out_documents())
        return evaluation.unigram_loss(train, test, self._encode.vocab_size, most)

    def describe(self) -> dict[str, Any]:
        """Returns counts of documents and bytes, in all and by source; JSON-able."""
        sources: list[dict[str, Any]] = [
            {
                "files": part.config.files,
                "documents": len(part.source.key),
                "held_out_documents": len(part.held_out),
                "bytes": part.source.nbytes,
                "weight": part.config.weight,
            }
            for part in self._parts
        ]
        totals = {
            name: sum(source[name] for source in sources)
            for name in ("documents", "held_out_documents", "bytes")
        }
        return {**totals, "sources": sources}

    def _mixture(self, seed: int) -> Mixture:
        skip = self._config.bad_records == "skip"
        orders = [
            endless(
                TrainDocuments(part.source, part.train, skip),
                part.blocks,
                f"{seed}/{i}" if self._config.shuffle else None,
            )
            for i, part in enumerate(self._parts)
        ]
        patience = sum(len(part.train) for part in self._parts) + _SPARE_TURNS
        return Mixture(orders, [part.config.weight for part in self._parts], patience)

    def _held_out_documents(self) -> Iterator[Document]:
        for part in self._parts:
            for index in part.held_out.tolist():
                try:
                    yield part.source.document(index)
                except BadRecord as bad:
                    if self._config.bad_records == "fail":
                        raise DataError(refusal(bad)) from None

    def _check_enough(self) -> None:
        """Raises DataError unless each source has text, and all of them fill one sequence."""
        total = 0
        for part in self._parts:
            found = 0
            documents = TrainDocuments(part.source, part.train, self._config.bad_records == "skip")
            for ids in map(documents.__getitem__, range(len(documents))):
                found += 0 if isinstance(ids, str) else len(ids)
                if total + found >= self._seq_len:
                    break
            if not found:
                raise DataError(_empty(part, self._config))
            total += found
        if total < self._seq_len:
            count = sum(len(part.train) for part in self._parts)
            raise DataError(
                f"the data holds {total} tokens to train on ({count} documents), and one sequence takes "
                f"{self._seq_len}; add text, or set train.seq_len to at most {total}"
            )


def open_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Opens a run's data: finds and indexes the files, and splits them. Globs begin in the current directory.

    The global batches are a function of the data, the tokenizer, `seed`, `batch_size`, `seq_len` and the
    step; not of the processes or workers that make them.

    Args:
      config: what to read.
      tokenizer: of the model.
      seq_len: T, tokens a row.
      batch_size: B, rows of a global batch.
      seed: of the order of documents.
      process_index, process_count: which contiguous share of the rows is this process's.

    Raises:
      ConfigError: for sizes that cannot work.
      DataError: if there is no data, too little, or it cannot be read.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seq_len", seq_len, 2)):
        if value < least:
            raise ConfigError(f"train.{name} is {value}; it must be at least {least}")
    if batch_size % process_count:
        raise ConfigError(
            f"train.batch_size is {batch_size}, which {process_count} processes cannot share equally; "
            "make it a multiple of that"
        )
    encode = Encoder(tokenizer)
    rows = batch_size // process_count
    parts = [_split(source, config, open_source(source, encode)) for source in config.sources]
    return Data(
        config,
        parts,
        encode,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        mine=range(process_index * rows, (process_index + 1) * rows),
    )


def train_texts(config: DataConfig) -> Iterator[str]:
    """Yields the documents that are trained on, in the order they lie: what a tokenizer may learn from.

    Raises:
      DataError: if there is none, or one cannot be read.
    """
    for source in config.sources:
        records = open_records(source)
        held = held_out(keys([file.name for file in records.files], records.counts), config.held_out)
        for index in np.flatnonzero(~held).tolist():
            try:
                yield records.text(index)
            except BadRecord as bad:
                if config.bad_records == "fail":
                    raise DataError(refusal(bad)) from None


def _split(config: SourceConfig, data: DataConfig, source: Source) -> _Part:
    held = held_out(source.key, data.held_out)
    blocks = source.blocks
    if blocks is not None:  # as many of each block as are trained on
        block_of = np.repeat(np.arange(len(blocks)), blocks)
        blocks = np.bincount(block_of[~held], minlength=len(blocks))
    part = _Part(config, source, np.flatnonzero(~held), np.flatnonzero(held), blocks)
    if not len(part.train):
        raise DataError(_empty(part, data))
    return part


def _empty(part: _Part, config: DataConfig) -> str:
    records = len(part.source.key)
    if not records:
        return f"the files that {part.config.files!r} matches hold no text; give files that do"
    why = ""
    if config.bad_records == "skip":
        why = '; data.bad_records is "skip": set it to "fail" to see what is wrong with the first'
    return f"none of the {records} records of {part.config.files!r} holds usable text{why}"
