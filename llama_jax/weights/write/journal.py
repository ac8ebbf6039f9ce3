"""A journal file that records which regions of an output have been written.

A region is recorded after its data has been synced, so the journal is valid even after a power failure.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


class Journal:
    """The completed regions of a plan.

    Args:
      path: the journal file.
      job: identifies the output; entries of another job are ignored.
      num_regions: number of regions of the plan.
      resume: read the existing file; otherwise start an empty journal.

    Attributes:
      completed: the CRC-32 of each completed region, by region index.
    """

    def __init__(self, path: Path, job: str, num_regions: int, *, resume: bool) -> None:
        self.path = path
        found = self._read(job) if resume else {}
        self.completed = {index: crc for index, crc in found.items() if 0 <= index < num_regions}
        self._unsaved: dict[int, int] = {}
        # The file is rewritten even when resuming: its last line may be truncated.
        lines = [{"job": job}, self.completed] if self.completed else [{"job": job}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _read(self, job: str) -> dict[int, int]:
        """Reads the file up to a truncated line; returns nothing if it is of another job."""
        completed: dict[int, int] = {}
        try:
            lines = self.path.read_text().splitlines()
            if json.loads(lines[0]) != {"job": job}:
                return {}
            for line in lines[1:]:
                completed.update({int(index): int(crc) for index, crc in json.loads(line).items()})
        except (OSError, ValueError, IndexError, AttributeError, TypeError):
            pass
        return completed

    def add(self, checksums: dict[int, int]) -> None:
        """Adds written regions; call `save` once their data has been synced."""
        self._unsaved.update(checksums)
        self.completed.update(checksums)

    def save(self) -> None:
        """Appends the regions added since the last call to the file."""
        if self._unsaved:
            with self.path.open("a") as file:
                file.write(json.dumps(self._unsaved) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._unsaved = {}
