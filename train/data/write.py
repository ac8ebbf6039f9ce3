"""Tokenizing ahead of time: writes a source's documents as ArrayRecord files of token ids."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import DataError

from ..config.data import BadRecords, SourceConfig
from .encode import Encoder
from .files import INDEX, File
from .records import BadRecord, bad_record_error
from .source import HEADER_BYTES, VERSION, Document, TextSource, open_records
from .tables import Readers

SHARD_BYTES = 1 << 28


def write_tokens(
    config: SourceConfig,
    encode: Encoder,
    out: Path,
    *,
    bad_records: BadRecords = "fail",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Writes the directory `out`, which can replace the text in `data.files`: the batches are the same.

    Args:
      config: the source.
      encode: the tokenizer's encoder.
      out: a directory that does not exist yet; it is created atomically when complete.
      bad_records: as in `DataConfig`.
      progress: called with (documents done, total documents).

    Returns:
      `documents`, `tokens`, `bytes` and `skipped`, a count by reason.

    Raises:
      DataError: if the text cannot be read, or the directory exists or cannot be written.
    """
    source = TextSource(open_records(config), config.field, encode)
    if not len(source.keys):
        raise DataError(f"the files that {config.files!r} matches have no text; use files that do")
    dtype = np.dtype("<u2" if encode.vocab_size <= 1 << 16 else "<u4")
    skipped: collections.Counter[str] = collections.Counter()
    totals = {"documents": 0, "tokens": 0, "bytes": 0}
    with atomic_directory(out) as partial:
        shards = _Shards(partial)
        for i in range(len(source.keys)):
            try:
                document = source.document(i)
            except BadRecord as bad:
                if bad_records == "fail":
                    raise DataError(bad_record_error(bad.message)) from None
                skipped[bad.reason] += 1
                document = Document(
                    np.zeros(0, np.int32), 0
                )  # keeps the numbering of the others; training ignores it
            shards.write(
                document.nbytes.to_bytes(HEADER_BYTES, "little") + document.ids.astype(dtype).tobytes()
            )
            totals["documents"] += bool(len(document.ids))
            totals["tokens"] += len(document.ids)
            totals["bytes"] += document.nbytes
            progress(i + 1, len(source.keys))
        index = {
            "version": VERSION,
            "tokenizer": encode.fingerprint,
            "fingerprint": source.fingerprint,
            "dtype": dtype.str,
            "nbytes": source.nbytes,
            "tokens": totals["tokens"],
            "blocks": source.blocks
            and {"sizes": source.blocks.sizes.tolist(), "window": source.blocks.window},
            "shards": shards.close(),
            "files": list(zip(source.names, source.records.counts.tolist(), strict=True)),
        }
        (partial / INDEX).write_text(json.dumps(index))
    return {**totals, "skipped": dict(skipped)}


class _Shards:
    """Writes ArrayRecord files of about SHARD_BYTES."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: Any = None
        self._done: list[tuple[str, int]] = []
        self._count = self._bytes = 0

    def write(self, record: bytes) -> None:
        from array_record.python import array_record_module

        if self._writer is None:
            self._path = self._folder / f"tokens-{len(self._done):05}.arrayrecord"
            self._writer = array_record_module.ArrayRecordWriter(str(self._path), "group_size:1")
            self._count = self._bytes = 0
        self._writer.write(record)
        self._count += 1
        self._bytes += len(record)
        if self._bytes >= SHARD_BYTES:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._done.append((self._path.name, self._count))
            if Readers([File(str(self._path), self._path.name, 0, 0)]).count(0) != self._count:
                raise DataError(f"{self._folder} does not contain all that was written; is the disk full?")
            self._writer = None

    def close(self) -> list[tuple[str, int, int]]:
        """Returns the name, records and bytes of each file."""
        self._close_shard()
        return [(name, count, (self._folder / name).stat().st_size) for name, count in self._done]


@contextlib.contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yields a temporary directory next to `out`, renamed to `out` on success and deleted on failure."""
    if out.exists():
        raise DataError(f"{out} exists; use another name, or remove it")
    partial = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(out)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise DataError(f"cannot write {out} ({why}); use another path") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
