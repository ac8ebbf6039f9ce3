"""Validation batches, in which every token is predicted once, and the unigram baseline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .encode import Document


def pack_documents(documents: Iterable[Document], seq_len: int) -> Iterator[dict[str, Any]]:
    """Packs documents into rows so that every token but a document's first is predicted exactly once.

    A document that does not fit continues in the next row, which starts with the last token of the previous
    row, since a model predicts only within a row.

    Yields:
      `tokens`, `segment_ids`, `positions`, int32 [seq_len], and `bytes`: the UTF-8 length of the row's
      predicted text, where a document's bytes are spread evenly over its predictions.
    """
    row, offset, segment = _row(seq_len), 0, 0
    for document in documents:
        ids, start, last = document.ids, 0, len(document.ids) - 1
        while start < last:
            if seq_len - offset < 2:  # no room for a prediction
                yield row
                row, offset, segment = _row(seq_len), 0, 0
            part = ids[start : start + seq_len - offset]
            end = offset + len(part)
            segment += 1
            row["tokens"][offset:end] = part
            row["segment_ids"][offset:end] = segment
            row["positions"][offset:end] = np.arange(len(part))
            last_predicted = start + len(part) - 1
            row["bytes"] += document.nbytes * last_predicted // last - document.nbytes * start // last
            offset, start = end, last_predicted
    if segment:
        yield row


def split_document(document: Document, separators: Sequence[int]) -> Iterator[Document]:
    """Yields the documents within a document, each of which ends at one of the ids `separators`."""
    ends = np.flatnonzero(np.isin(document.ids, separators)) + 1
    taken = 0
    for ids in np.split(document.ids, ends[ends < len(document.ids)]):
        before = document.nbytes * taken // max(len(document.ids), 1)
        taken += len(ids)
        yield Document(ids, document.nbytes * taken // max(len(document.ids), 1) - before)


def global_batches(
    rows: Iterable[dict[str, Any]], batch_size: int, local_rows: range
) -> Iterator[dict[str, Any]]:
    """Groups rows into global batches, pads the last one, and keeps this process's rows.

    Yields:
      The rows' arrays, [len(local_rows), seq_len] each, and `bytes` of the global batch.
    """
    group: list[dict[str, Any]] = []

    def batch() -> dict[str, Any]:
        names = [name for name in group[0] if name != "bytes"]
        empty = {name: np.zeros_like(group[0][name]) for name in names}
        full = [*group, *([empty] * (batch_size - len(group)))]
        arrays = {name: np.stack([full[i][name] for i in local_rows]) for name in names}
        return {**arrays, "bytes": sum(row["bytes"] for row in group)}

    for row in rows:
        group.append(row)
        if len(group) == batch_size:
            yield batch()
            group.clear()
    if group:
        yield batch()


def batches_of(total: int, share: float) -> int:
    """Returns a source's number of the `total` batches of an evaluation: its share, and at least one."""
    return max(1, round(total * share))


def weighted_mean(values: Iterable[tuple[float, float]]) -> float:
    """Returns the mean of (value, weight) pairs, leaving NaN out; NaN if none is left."""
    kept = [(value, weight) for value, weight in values if not np.isnan(value)]
    total = sum(weight for _, weight in kept)
    return sum(value * weight for value, weight in kept) / total if kept else float("nan")


def unigram_logprobs(train: Iterable[np.ndarray], vocab_size: int, max_tokens: int) -> np.ndarray:
    """log p(v) = log((count(v) + 1) / (total + V)), f64 [V]: a unigram model with add-one smoothing.

    Args:
      train: documents, int32 [n] each; the first id, which no model predicts, does not count.
      vocab_size: V.
      max_tokens: maximum number of tokens to count.
    """
    counts, seen = np.ones(vocab_size, np.int64), 0
    for ids in train:
        counts += np.bincount(ids[1:], minlength=vocab_size)
        seen += len(ids) - 1
        if seen >= max_tokens:
            break
    return np.log(counts / counts.sum())


def unigram_loss(logprobs: np.ndarray, counts: np.ndarray) -> float:
    """-mean log p(token) over predicted tokens, in nats; NaN if there are none.

    Args:
      logprobs: f64 [V].
      counts: int64 [V], how often each token is predicted.
    """
    return float(-(counts * logprobs).sum() / counts.sum()) if counts.any() else float("nan")


def token_counts(rows: Iterable[dict[str, Any]], vocab_size: int) -> np.ndarray:
    """Returns how often each token is predicted in packed rows, int64 [V].

    Args:
      rows: as from `pack_documents`.
      vocab_size: V.
    """
    counts = np.zeros(vocab_size, np.int64)
    for row in rows:
        predicted = row["tokens"][(row["segment_ids"] > 0) & (row["positions"] > 0)]
        counts += np.bincount(predicted, minlength=vocab_size)
    return counts


def _row(seq_len: int) -> dict[str, Any]:
    names = ("tokens", "segment_ids", "positions")
    return {**{name: np.zeros(seq_len, np.int32) for name in names}, "bytes": 0}
