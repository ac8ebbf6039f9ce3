"""Step 2: the documents whose ids are those of another; one copy of each stays.

Of equal documents one of the validation set stays if there is one, so that nothing that is evaluated is
trained on; otherwise the first, in the order of the sources and of their records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llama_jax.storage.atomic import atomic_file

from .chunks import DIGEST_BYTES, Chunk, read_chunk
from .files import disk_errors
from .job import VALIDATION, Job

_BUCKET = 1 << 24  # documents whose hashes are compared at once
_NUMBER_BITS, _SECTION_BITS = 44, 18


def priorities(job: Job, section: int, number: int) -> np.ndarray:
    """Returns int64 [records] of a chunk: of equal documents the one with the lowest stays."""
    whole = job.sections[section]
    records = np.array(whole.chunk(number), np.int64)
    is_train = ~whole.is_validation(records) & (whole.name != VALIDATION)
    return (is_train.astype(np.int64) << (_NUMBER_BITS + _SECTION_BITS)) | (section << _NUMBER_BITS) | records


def chunk_of(job: Job, priority: int) -> tuple[int, int, int]:
    """Returns section, chunk, and the number within the chunk of a document."""
    section = (priority >> _NUMBER_BITS) & ((1 << _SECTION_BITS) - 1)
    chunk, number = divmod(priority & ((1 << _NUMBER_BITS) - 1), job.sections[section].chunk_records)
    return section, chunk, number


def find_duplicates(job: Job) -> int:
    """Writes the duplicates of each chunk; returns how many there are in all."""
    total = sum(section.records for section in job.sections)
    buckets = min(max(1, -(-total // _BUCKET)), 256)
    found = [np.zeros(0, np.int64)]
    for bucket in range(buckets):
        digests, order = [], []
        for section, number in job.chunks():
            chunk = read_chunk(job, section, number)
            kept = (chunk.lengths > 0) & (chunk.digests[:, 0] % buckets == bucket)
            digests.append(chunk.digests[kept])
            order.append(priorities(job, section, number)[kept])
        found.append(_later_copies(np.concatenate(digests), np.concatenate(order)))
    duplicates = np.concatenate(found)
    by_chunk: dict[tuple[int, int], list[int]] = {}
    for priority in duplicates.tolist():
        section, number, record = chunk_of(job, priority)
        by_chunk.setdefault((section, number), []).append(record)
    for (section, number), records in by_chunk.items():
        write_duplicates(job, section, number, records)
    return len(duplicates)


def _later_copies(digests: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Returns the priorities of all documents but the first of each hash."""
    words = np.ascontiguousarray(digests).view("<u8").reshape(-1, DIGEST_BYTES // 8)
    by_hash = np.lexsort((order, *words.T))
    words = words[by_hash]
    return order[by_hash[1:][(words[1:] == words[:-1]).all(1)]]


def write_duplicates(job: Job, section: int, number: int, records: Iterable[int]) -> None:
    """Writes the numbers, within a chunk, of the documents that are left out."""
    path = _path(job, section, number)
    with disk_errors(job.out), atomic_file(path) as partial:
        np.array(sorted(records), "<i8").tofile(partial)


def read_unique(job: Job, section: int, number: int) -> Chunk:
    """Returns a chunk in which the duplicates are empty."""
    chunk = read_chunk(job, section, number)
    path = _path(job, section, number)
    if job.keep_duplicates or not path.exists():
        return chunk
    duplicates = np.fromfile(path, "<i8")
    kept = np.ones(len(chunk.lengths), bool)
    kept[duplicates] = False
    ids = chunk.ids[np.repeat(kept, chunk.lengths)]
    return Chunk(ids, chunk.lengths * kept, chunk.nbytes * kept, chunk.digests)


def duplicates_by_section(job: Job) -> list[int]:
    """Returns the number of duplicates in each section."""
    counts = [0] * len(job.sections)
    for section, number in job.chunks():
        path = _path(job, section, number)
        if not job.keep_duplicates and path.exists():
            counts[section] += path.stat().st_size // 8
    return counts


def _path(job: Job, section: int, number: int) -> Path:
    return job.work("duplicates", section, number).with_suffix(".numbers")


def digest_pairs(job: Job, section: int, number: int) -> Iterator[tuple[bytes, int]]:
    """Yields the hash and priority of each document of a chunk."""
    chunk = read_chunk(job, section, number)
    order = priorities(job, section, number)
    for i in np.flatnonzero(chunk.lengths).tolist():
        yield chunk.digests[i].tobytes(), int(order[i])
