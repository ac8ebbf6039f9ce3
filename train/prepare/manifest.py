"""The end: the manifest of each folder, which makes it one that training reads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.files import INDEX
from ..data.prepared import VERSION, write_blocks
from .chunks import read_counts
from .duplicates import duplicates_by_section
from .files import disk_errors, write_text
from .job import WORK, Job, Section
from .shards import Shard

_PACKAGES = ("llama-jax", "array-record", "grain", "numpy", "apache-beam", "sentencepiece", "tokenizers")


def write_manifests(job: Job, shards: Sequence[tuple[Shard, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Writes the manifest of each section, and removes what only the preparation needed.

    Args:
      job: what was prepared.
      shards: each shard with its counts.

    Returns:
      The manifests.
    """
    duplicates = duplicates_by_section(job)
    manifests = []
    with disk_errors(job.out):
        for i, section in enumerate(job.sections):
            mine = [(shard, counts) for shard, counts in shards if shard.section == i]
            manifest = _manifest(job, section, mine, duplicates[i], _skipped(job, i))
            write_text(job.folder(i) / INDEX, json.dumps(manifest, indent=1))
            manifests.append(manifest)
        shutil.rmtree(job.out / WORK, ignore_errors=True)
    return manifests


def _manifest(
    job: Job,
    section: Section,
    shards: Sequence[tuple[Shard, dict[str, Any]]],
    duplicates: int,
    skipped: dict[str, int],
) -> dict[str, Any]:
    counts = [count for _, count in shards]
    rows = {
        split: [
            [count["name"], count["records"], count["size"], count["digest"]]
            for shard, count in shards
            if shard.split == split
        ]
        for split in ("train", "validation")
    }
    fingerprint = section.source.fingerprint
    if duplicates:  # other documents than the text's
        kept = json.dumps([fingerprint, *([row[3] for row in rows[split]] for split in rows)])
        fingerprint = hashlib.blake2b(kept.encode(), digest_size=16).hexdigest()
    lengths = np.zeros(max((len(count["lengths"]) for count in counts), default=0), np.int64)
    for count in counts:
        lengths[: len(count["lengths"])] += np.array(count["lengths"], np.int64)
    return {
        "version": VERSION,
        "tokenizer": job.encode.fingerprint,
        "fingerprint": fingerprint,
        "dtype": job.dtype.str,
        "seed": section.seed,
        "validation_fraction": section.validation_fraction,
        "blocks": write_blocks(section.blocks),
        "records": section.records,
        "documents": sum(count["documents"] for count in counts),
        "tokens": sum(count["tokens"] for count in counts),
        "bytes": sum(count["bytes"] for count in counts),
        "duplicates": duplicates,
        "skipped": skipped,
        "lengths": {str(1 << i): int(n) for i, n in enumerate(lengths) if n},
        "settings": job.settings,
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        **rows,
    }


def _skipped(job: Job, section: int) -> dict[str, int]:
    total: dict[str, int] = {}
    for number in range(job.sections[section].chunks):
        counts = read_counts(job.work("chunks", section, number))
        for reason, count in (counts or {"skipped": {}})["skipped"].items():
            total[reason] = total.get(reason, 0) + count
    return total


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
