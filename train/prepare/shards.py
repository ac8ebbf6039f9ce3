"""Step 3: the documents in the order of the first epoch, in files of about `SHARD_BYTES`."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from grain.experimental import index_shuffle

from llama_jax.errors import DataError
from llama_jax.storage.atomic import atomic_file

from ..data.files import File
from ..data.layout import places_of
from ..data.prepared import HEADER_BYTES
from ..data.tables import Readers
from .duplicates import read_unique
from .files import disk_errors, file_digest, write_text
from .job import Job, Split
from .stored import send, sent

SHARD_BYTES = 1 << 29
_SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: the documents at some places of a split's order.

    Attributes:
      section: number of the section.
      split: of which it has documents.
      number, count: which of how many shards of this split.
      places: in the order.
    """

    section: int
    split: Split
    number: int
    count: int
    places: range

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05}-of-{self.count:05}.arrayrecord"


def plan_shards(job: Job, tokens: Sequence[int]) -> list[Shard]:
    """Returns all shards.

    Args:
      job: what there is to prepare.
      tokens: the number of ids in each section, duplicates included.
    """
    shards = []
    for i, section in enumerate(job.sections):
        nbytes = tokens[i] * job.dtype.itemsize + section.records * HEADER_BYTES
        for split in _SPLITS:
            records = section.count(split)
            count = -(-nbytes * records // (section.records * SHARD_BYTES)) if records else 0
            size = -(-records // max(count, 1))
            starts = range(0, records, max(size, 1))
            shards += [
                Shard(i, split, n, len(starts), range(first, min(first + size, records)))
                for n, first in enumerate(starts)
            ]
    return shards


def gather(job: Job, shard: Shard) -> Iterator[bytes]:
    """Yields a shard's records, read from the chunks."""
    section = job.sections[shard.section]
    ranks = np.array(shard.places, np.int64)
    if section.seed is not None and shard.split == "train":
        last, seed = section.count("train") - 1, section.seed
        ranks = np.array([index_shuffle(p, max_index=last, seed=seed, rounds=4) for p in shard.places])
    records = section.records_at(ranks, shard.split)
    chunks, numbers = np.divmod(records, section.chunk_records)
    order = np.argsort(chunks, kind="stable")
    found: list[bytes] = [b""] * len(records)
    for group in np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1):
        chunk = read_unique(job, shard.section, int(chunks[group[0]]))
        ends = np.cumsum(chunk.lengths)
        for place in group.tolist():
            number = int(numbers[place])
            end, length = int(ends[number]), int(chunk.lengths[number])
            found[place] = _record(chunk.ids[end - length : end], int(chunk.nbytes[number]))
    return iter(found)


def scatter(job: Job, section: int, number: int, shards: Iterable[Shard]) -> Iterator[tuple[int, int, bytes]]:
    """Yields the records of one chunk that belong to `shards`, which are of its section.

    Yields:
      The index in `shards`, the place in the order, and the record.
    """
    whole = job.sections[section]
    chunk = read_unique(job, section, number)
    records = np.array(whole.chunk(number), np.int64)
    held_out = whole.is_validation(records)
    documents = chunk.documents()
    by_split: dict[Split, list[tuple[int, Shard]]] = collections.defaultdict(list)
    for index, shard in enumerate(shards):
        by_split[shard.split].append((index, shard))
    for split, wanted in by_split.items():
        chosen = np.flatnonzero(held_out if split == "validation" else ~held_out)
        places = whole.ranks(records[chosen], split)
        if whole.seed is not None and split == "train":
            places = places_of(places, whole.count("train"), whole.seed)
        for index, shard in wanted:
            here = (places >= shard.places.start) & (places < shard.places.stop)
            for i, place in zip(chosen[here].tolist(), places[here].tolist(), strict=True):
                yield index, place, _record(documents[i], int(chunk.nbytes[i]))


def _record(ids: np.ndarray, nbytes: int) -> bytes:
    return nbytes.to_bytes(HEADER_BYTES, "little") + ids.tobytes()


def write_shard(job: Job, shard: Shard, records: Iterable[bytes]) -> dict[str, Any]:
    """Writes one shard, and returns its counts, which are kept beside it until the end.

    Returns:
      `name`, `records`, `size`, `digest`, and of its documents that are not empty `documents`, `tokens`,
      `bytes` (of text) and `lengths`: how many have 2^i to 2^(i+1) - 1 ids, for each i.

    Raises:
      DataError: if it cannot be written.
    """
    from array_record.python import array_record_module

    path = job.folder(shard.section) / shard.name
    lengths: collections.Counter[int] = collections.Counter()
    counts: dict[str, Any] = {"name": shard.name, "records": 0, "documents": 0, "tokens": 0, "bytes": 0}
    with disk_errors(job.out), atomic_file(path) as partial:
        try:
            writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
            for record in records:
                writer.write(record)
                ids = (len(record) - HEADER_BYTES) // job.dtype.itemsize
                counts["records"] += 1
                counts["documents"] += bool(ids)
                counts["tokens"] += ids
                counts["bytes"] += int.from_bytes(record[:HEADER_BYTES], "little")
                if ids:
                    lengths[ids.bit_length() - 1] += 1
            writer.close()
        except RuntimeError as error:
            raise OSError(" ".join(str(error).split())) from None
        complete = len(shard.places) == counts["records"]
        if not complete or Readers([File(str(partial), "", *_stat(partial))]).count(0) != counts["records"]:
            raise DataError(f"{path} does not contain all that was written; is the disk full?")
        counts["size"] = partial.stat().st_size
        counts["digest"] = file_digest(partial)
    counts["lengths"] = [lengths[i] for i in range(max(lengths, default=-1) + 1)]
    with disk_errors(job.out):
        write_text(_counts_path(job, shard), json.dumps(counts))
        if job.store is not None and (stored := job.stored(shard.section)) is not None:
            send(path, stored / shard.name, job.store, counts)
    return counts


def finished(job: Job, shard: Shard) -> dict[str, Any] | None:
    """Returns the counts of a shard that is there with the digest that it was written with, or None."""
    if job.store is not None and (stored := job.stored(shard.section)) is not None:
        return sent(stored / shard.name, job.store)
    path = job.folder(shard.section) / shard.name
    try:
        counts: dict[str, Any] = json.loads(_counts_path(job, shard).read_bytes())
        size = path.stat().st_size
        return counts if size == counts["size"] and file_digest(path) == counts["digest"] else None
    except (OSError, ValueError):
        return None


def _counts_path(job: Job, shard: Shard) -> Path:
    return job.work("shards", shard.section, shard.split, shard.number).with_suffix(".json")


def _stat(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_size, info.st_mtime_ns
