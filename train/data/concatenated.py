"""The records of files of several formats, one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from .records import Blocks, Records


class Concatenated(Records):
    """Several `Records` as one."""

    def __init__(self, parts: Sequence[Records]):
        self._parts = parts
        self.files = [file for part in parts for file in part.files]
        self.counts = np.concatenate([part.counts for part in parts])
        self.nbytes = sum(part.nbytes for part in parts)
        self.digest = self._digest([part.digest for part in parts])
        self.blocks = _blocks(parts)
        self._part_ends = np.cumsum([len(part) for part in parts])

    def earlier_digest(self) -> str:
        return self._digest([part.earlier_digest() for part in self._parts])

    def _digest(self, digests: Sequence[str]) -> str:
        named = "".join(
            f"{type(part).__name__} {digest} " for part, digest in zip(self._parts, digests, strict=True)
        )
        return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()

    def _part(self, index: int) -> tuple[Records, int]:
        """Returns the part with a record, and the record's number in it."""
        i = int(np.searchsorted(self._part_ends, index, side="right"))
        return self._parts[i], index - int(self._part_ends[i]) + len(self._parts[i])

    def text(self, index: int) -> str:
        part, number = self._part(index)
        return part.text(number)

    def row(self, index: int) -> dict[str, Any]:
        part, number = self._part(index)
        return part.row(number)

    def location(self, index: int) -> str:
        part, number = self._part(index)
        return part.location(number)

    def select(self, columns: Sequence[str]) -> None:
        for part in self._parts:
            part.select(columns)


def _blocks(parts: Sequence[Records]) -> Blocks | None:
    """Returns the blocks of all parts: those with random access are cut into blocks of similar size."""
    blocks = [part.blocks for part in parts if part.blocks is not None]
    if not blocks:
        return None
    sized = [part for part in parts if part.blocks is not None]
    typical = sum(part.nbytes for part in sized) / max(sum(len(block.sizes) for block in blocks), 1)
    sizes = []
    for part in parts:
        if part.blocks is not None:
            sizes.append(part.blocks.sizes)
        else:
            count = min(len(part), int(part.nbytes / max(typical, 1)) + 1)
            sizes.append(np.diff(np.linspace(0, len(part), count + 1).astype(np.int64)))
    total = np.concatenate(sizes)
    if all(block.window == len(block.sizes) for block in blocks):  # they fit into memory as a whole
        return Blocks(total, len(total))
    return Blocks(total, min(block.window for block in blocks))
