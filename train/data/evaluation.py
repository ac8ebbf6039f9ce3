"""The held-out text: fixed batches in which every token is predicted once, and a baseline to beat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .source import Document


def pack(documents: Iterable[Document], seq_len: int) -> Iterator[dict[str, Any]]:
    """Packs documents into rows so that every token but a document's first is predicted exactly once.

    A document that does not fit goes on in the next row, which begins with the last token of the row
    before it: a model predicts only within a row.

    Yields:
      `tokens`, `segment_ids`, `positions`, int32 [seq_len], and `bytes`: of the text that the row's
      predictions spell, a document's bytes being spread evenly over its predictions.
    """
    row, at, segment = _row(seq_len), 0, 0
    for document in documents:
        ids, start, last = document.ids, 0, len(document.ids) - 1
        while start < last:
            if seq_len - at < 2:  # no room for a prediction
                yield row
                row, at, segment = _row(seq_len), 0, 0
            part = ids[start : start + seq_len - at]
            end = at + len(part)
            segment += 1
            row["tokens"][at:end] = part
            row["segment_ids"][at:end] = segment
            row["positions"][at:end] = np.arange(len(part))
            done = start + len(part) - 1
            row["bytes"] += document.nbytes * done // last - document.nbytes * start // last
            at, start = end, done
    if segment:
        yield row


def batches(rows: Iterable[dict[str, Any]], batch_size: int, mine: range) -> Iterator[dict[str, Any]]:
    """Groups rows into global batches, the last filled up with padding, and keeps the rows in `mine`.

    Yields:
      The rows' arrays, [len(mine), seq_len] each, and `bytes` of the global batch.
    """
    group: list[dict[str, Any]] = []

    def batch() -> dict[str, Any]:
        names = [name for name in group[0] if name != "bytes"]
        empty = {name: np.zeros_like(group[0][name]) for name in names}
        full = [*group, *([empty] * (batch_size - len(group)))]
        arrays = {name: np.stack([full[i][name] for i in mine]) for name in names}
        return {**arrays, "bytes": sum(row["bytes"] for row in group)}

    for row in rows:
        group.append(row)
        if len(group) == batch_size:
            yield batch()
            group.clear()
    if group:
        yield batch()


def unigram_loss(
    train: Iterable[np.ndarray], test: Iterable[np.ndarray], vocab_size: int, most: int
) -> float:
    """-mean log p(token), p(v) = (count(v) + 1) / (total + V): a unigram model with add-one smoothing.

    Args:
      train, test: documents, int32 [n] each; the first id, which no model predicts, is left out.
      vocab_size: V.
      most: how many training tokens to count at most.

    Returns:
      Nats a token over `test`, nan where it is empty.
    """
    counts, seen = np.ones(vocab_size, np.int64), 0
    for ids in train:
        counts += np.bincount(ids[1:], minlength=vocab_size)
        seen += len(ids) - 1
        if seen >= most:
            break
    wanted = np.zeros(vocab_size, np.int64)
    for ids in test:
        wanted += np.bincount(ids[1:], minlength=vocab_size)
    if not wanted.any():
        return float("nan")
    return float(-(wanted * np.log(counts / counts.sum())).sum() / wanted.sum())


def _row(seq_len: int) -> dict[str, Any]:
    names = ("tokens", "segment_ids", "positions")
    return {**{name: np.zeros(seq_len, np.int32) for name in names}, "bytes": 0}
