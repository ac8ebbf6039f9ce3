"""Which tokens' keys and values each row of a batch holds, and the longest prefix of a prompt among them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ALIGNMENT = 32
"""A shared prefix is a multiple of this, the smallest chunk of a prompt: a shorter one saves no work."""


class HeldTokens:
    """The tokens of every row's cache, on the host.

    Attributes:
      tokens: int32 [rows, S].
      length: int [rows], how many of them are held.
      used: int [rows], when a row was last written, as a count that grows.
    """

    def __init__(self, rows: int, length: int) -> None:
        """No row holds any token."""
        self.tokens = np.zeros((rows, length), np.int32)
        self.length = np.zeros(rows, np.int64)
        self.used = np.zeros(rows, np.int64)

    def set(self, row: int, tokens: np.ndarray) -> None:
        """A row now holds these tokens and no others."""
        self.tokens[row, : len(tokens)] = tokens
        self.length[row] = len(tokens)
        self._touch(row)

    def append(self, row: int, token: int) -> None:
        """A row holds one more token."""
        self.tokens[row, self.length[row]] = token
        self.length[row] += 1
        self._touch(row)

    def copy(self, row: int, to: int) -> None:
        """Another row now holds what a row does, and is as old."""
        self.tokens[to], self.length[to], self.used[to] = self.tokens[row], self.length[row], self.used[row]

    def forget(self, row: int) -> None:
        """A row no longer has to be kept."""
        self.length[row] = self.used[row] = 0

    def common(self, prompt: np.ndarray) -> np.ndarray:
        """int [rows]: the length of the prefix that each row has in common with a prompt, aligned."""
        most = min(len(prompt), int(self.length.max(initial=0)))
        same = self.tokens[:, :most] == prompt[:most]
        same &= np.arange(most) < self.length[:, None]
        length = np.where(same.all(1), most, np.argmin(same, axis=1)) if most else np.zeros_like(self.length)
        return length - length % ALIGNMENT

    def oldest(self, rows: Sequence[int]) -> int:
        """Of some rows, that which was written the longest ago."""
        return min(rows, key=lambda row: (self.used[row], row))

    def _touch(self, row: int) -> None:
        self.used[row] = self.used.max() + 1
