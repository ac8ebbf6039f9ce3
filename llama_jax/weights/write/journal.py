"""Which regions of an output are written, in a file that outlives the process.

Regions are entered after the disk has them: what the journal says holds after a power failure, too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path


class Journal:
    """What of a plan is written already.

    Args:
      path: the file.
      job: what is written; of another job's journal nothing is taken over.
      regions: how many there are.
      goes_on: take over what the file says; otherwise begin it anew.

    Attributes:
      done: the CRC-32 of each region that is written, by its number.
    """

    def __init__(self, path: Path, job: str, regions: int, *, goes_on: bool) -> None:
        self.path = path
        found = self._read(job) if goes_on else {}
        self.done = {index: crc for index, crc in found.items() if 0 <= index < regions}
        self._new: dict[int, int] = {}
        # Anew also where it is gone on with: the last line may have been cut short.
        lines = [{"job": job}, self.done] if self.done else [{"job": job}]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _read(self, job: str) -> dict[int, int]:
        """The regions that the file lists, none if it is another plan's, and no last line cut short."""
        done: dict[int, int] = {}
        try:
            lines = self.path.read_text().splitlines()
            if json.loads(lines[0]) != {"job": job}:
                return {}
            for line in lines[1:]:
                done.update({int(index): int(crc) for index, crc in json.loads(line).items()})
        except (OSError, ValueError, IndexError, AttributeError, TypeError):
            pass
        return done

    def add(self, checksums: dict[int, int]) -> None:
        """Notes regions as written; `save` is called when the disk has them."""
        self._new.update(checksums)
        self.done.update(checksums)

    def save(self) -> None:
        """Enters in the file what was noted since the last time."""
        if self._new:
            with self.path.open("a") as file:
                file.write(json.dumps(self._new) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._new = {}
