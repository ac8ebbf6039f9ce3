"""Completions as the rows of batches, and back; how far two programs' log-probabilities are apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .sampler import Sampled

Arrays = dict[str, np.ndarray]


def pack(prompts: Sequence[Sequence[int]], sampled: Sampled, seq_len: int) -> Arrays:
    """A row for each completion, after its prompt.

    Returns:
      int32 [R, T]: `tokens`, `segment_ids`, `positions`, `mask`, which is 1 in completions, and `index`, the
      number of each token in its completion, -1 elsewhere.
    """
    names = ("tokens", "segment_ids", "positions", "mask", "index")
    arrays = {name: np.zeros((len(prompts), seq_len), np.int32) for name in names}
    arrays["index"] -= 1
    for row, prompt in enumerate(prompts):
        start, length = len(prompt), int(sampled.lengths[row])
        end = start + length
        arrays["tokens"][row, :start] = prompt
        arrays["tokens"][row, start:end] = sampled.tokens[row, :length]
        arrays["segment_ids"][row, :end] = 1
        arrays["positions"][row, :end] = np.arange(end)
        arrays["mask"][row, start:end] = 1
        arrays["index"][row, start:end] = np.arange(length)
    return arrays


def parts(arrays: Arrays, rows: int) -> list[Arrays]:
    """Batches of so many rows each."""
    count = len(arrays["tokens"])
    return [{name: x[start : start + rows] for name, x in arrays.items()} for start in range(0, count, rows)]


def scattered(values: np.ndarray, arrays: Arrays) -> np.ndarray:
    """[R, C] of completions -> [R, T] of rows, 0 outside completions."""
    out = np.zeros(arrays["mask"].shape, values.dtype)
    there = arrays["mask"] > 0
    out[there] = values[np.nonzero(there)[0], arrays["index"][there]]
    return out


def gathered(values: np.ndarray, arrays: Arrays, longest: int) -> np.ndarray:
    """[R, T] of rows -> [R, C] of completions, 0 after their end."""
    out = np.zeros((len(values), longest), values.dtype)
    there = arrays["mask"] > 0
    out[np.nonzero(there)[0], arrays["index"][there]] = values[there]
    return out


def mismatch(rollout: np.ndarray, trainer: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """How far apart the log-probabilities of the same tokens are, in the rollout and in the trainer."""
    difference = (trainer.astype(np.float64) - rollout)[mask]
    return {
        "rollout_logprob_diff_mean": np.abs(difference).mean(),
        "rollout_logprob_diff_max": np.abs(difference).max(),
        "rollout_kl": (np.expm1(difference) - difference).mean(),  # k3 of KL(rollout || trainer)
    }
