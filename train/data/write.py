"""Tokenizing beforehand: a source's documents as ArrayRecord files of token ids."""

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
from .records import BadRecord, refusal
from .source import HEADER, VERSION, Document, TextSource, open_records
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
    """Writes the folder `out`, which `data.files` can name in place of the text: the batches are the same.

    Args:
      config: the text.
      encode: of the model's tokenizer.
      out: a folder that does not exist yet; it appears when it is whole.
      bad_records: as in `DataConfig`.
      progress: called with (documents done, documents in all).

    Returns:
      `documents`, `tokens`, `bytes` and `skipped`, a count by reason.

    Raises:
      DataError: if the text cannot be read, or the folder exists or cannot be written.
    """
    source = TextSource(open_records(config), config.field, encode)
    if not len(source.key):
        raise DataError(f"the files that {config.files!r} matches hold no text; give files that do")
    dtype = np.dtype("<u2" if encode.vocab_size <= 1 << 16 else "<u4")
    skipped: collections.Counter[str] = collections.Counter()
    totals = {"documents": 0, "tokens": 0, "bytes": 0}
    with folder(out) as beside:
        shards = _Shards(beside)
        for i in range(len(source.key)):
            try:
                document = source.document(i)
            except BadRecord as bad:
                if bad_records == "fail":
                    raise DataError(refusal(bad.message)) from None
                skipped[bad.reason] += 1
                document = Document(np.zeros(0, np.int32), 0)  # keeps its number, and counts as none
            shards.write(document.nbytes.to_bytes(HEADER, "little") + document.ids.astype(dtype).tobytes())
            totals["documents"] += bool(len(document.ids))
            totals["tokens"] += len(document.ids)
            totals["bytes"] += document.nbytes
            progress(i + 1, len(source.key))
        index = {
            "version": VERSION,
            "tokenizer": encode.fingerprint,
            "fingerprint": source.fingerprint,
            "dtype": dtype.str,
            "nbytes": source.nbytes,
            "tokens": totals["tokens"],
            "blocks": None if source.blocks is None else source.blocks.tolist(),
            "shards": shards.close(),
            "files": list(zip(source.names, source.records.counts.tolist(), strict=True)),
        }
        (beside / INDEX).write_text(json.dumps(index))
    return {**totals, "skipped": dict(skipped)}


class _Shards:
    """ArrayRecord files that are closed when they are large."""

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
            self._end()

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._done.append((self._path.name, self._count))
            if Readers([File(str(self._path), self._path.name, 0, 0)]).count(0) != self._count:
                raise DataError(f"{self._folder} did not take all that was written; is the disk full?")
            self._writer = None

    def close(self) -> list[tuple[str, int, int]]:
        """Returns the name, records and bytes of each file."""
        self._end()
        return [(name, count, (self._folder / name).stat().st_size) for name, count in self._done]


@contextlib.contextmanager
def folder(out: Path) -> Iterator[Path]:
    """Gives a folder beside `out` that becomes `out` if all goes well, and goes away if not."""
    if out.exists():
        raise DataError(f"{out} exists; give a folder that does not, or remove it")
    beside = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        beside.mkdir(parents=True)
        yield beside
        beside.rename(out)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise DataError(f"cannot write {out} ({why}); write it elsewhere") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
