"""Step 1: the documents of one range of records as token ids, in one file, with their lengths and hashes."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.errors import DataError
from llama_jax.storage.atomic import atomic_file

from ..data.records import BadRecord, bad_record_error
from .files import disk_errors, file_digest, write_text
from .job import Job

DIGEST_BYTES = 16
_RECORD = np.dtype([("length", "<i4"), ("nbytes", "<i4"), ("digest", "u1", DIGEST_BYTES)])


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The documents of one chunk.

    Attributes:
      ids: [tokens], of all documents one after the other; on disk.
      lengths: int64 [records], number of ids of each; 0 of an empty text or a skipped record.
      nbytes: int64 [records], UTF-8 length of each text.
      digests: uint8 [records, DIGEST_BYTES], a hash of each document's ids.
    """

    ids: np.ndarray
    lengths: np.ndarray
    nbytes: np.ndarray
    digests: np.ndarray

    def documents(self) -> list[np.ndarray]:
        """Returns the ids of each document."""
        return np.split(self.ids, np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []


def write_chunk(job: Job, section: int, number: int) -> dict[str, Any]:
    """Tokenizes one chunk, unless that is done, and returns its counts.

    Returns:
      `records`, `tokens`, `digests` of its two files, and `skipped`, a count by reason.

    Raises:
      DataError: for a bad record, or if the chunk cannot be written.
    """
    path = job.work("chunks", section, number)
    done = read_counts(path)
    if done is not None:
        return done
    source = job.sections[section].source
    skipped: collections.Counter[str] = collections.Counter()
    rows, ids = [], []
    for index in job.sections[section].chunk(number):
        try:
            document = source.document(index)
        except BadRecord as bad:
            if not job.skip_bad:
                raise DataError(bad_record_error(bad.message)) from None
            skipped[bad.reason] += 1
            rows.append((0, 0, np.zeros(DIGEST_BYTES, np.uint8)))
            continue
        stored = document.ids.astype(job.dtype)
        digest = hashlib.blake2b(stored.tobytes(), digest_size=DIGEST_BYTES).digest()
        rows.append((len(stored), document.nbytes, np.frombuffer(digest, np.uint8)))
        ids.append(stored)
    with disk_errors(job.out):
        digests = []
        for suffix, array in (
            (".ids", np.concatenate([np.zeros(0, job.dtype), *ids])),
            (".records", np.array(rows, _RECORD)),
        ):
            with atomic_file(path.with_suffix(suffix)) as partial:
                array.tofile(partial)
                digests.append(file_digest(partial))
        counts = {
            "records": len(rows),
            "tokens": sum(map(len, ids)),
            "digests": digests,
            "skipped": dict(skipped),
        }
        write_text(path.with_suffix(".json"), json.dumps(counts))
    return counts


def read_counts(path: Path, *, check: bool = False) -> dict[str, Any] | None:
    """Returns what `write_chunk` has returned for a chunk, or None if it is not there.

    Args:
      path: of the chunk, without suffix.
      check: whether to read its files, and take it for absent if they have changed.
    """
    try:
        counts = json.loads(path.with_suffix(".json").read_bytes())
        if check:
            now = [file_digest(path.with_suffix(suffix)) for suffix in (".ids", ".records")]
            if now != counts["digests"]:
                raise ValueError
    except (OSError, ValueError):
        if check:
            path.with_suffix(".json").unlink(missing_ok=True)
        return None
    return counts


def read_chunk(job: Job, section: int, number: int) -> Chunk:
    """Returns a chunk that is written, with its ids mapped from disk.

    Raises:
      DataError: if it cannot be read.
    """
    path = job.work("chunks", section, number)
    try:
        records = np.fromfile(path.with_suffix(".records"), _RECORD)
        empty = not path.with_suffix(".ids").stat().st_size
        ids = np.zeros(0, job.dtype) if empty else np.memmap(path.with_suffix(".ids"), job.dtype, "r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}.ids cannot be read ({error}); run the same command again") from None
    lengths = records["length"].astype(np.int64)
    if len(records) != len(job.sections[section].chunk(number)) or lengths.sum() != len(ids):
        raise DataError(f"{path}.ids is not what was written; remove {path}.json and run the command again")
    return Chunk(ids, lengths, records["nbytes"].astype(np.int64), records["digest"])
