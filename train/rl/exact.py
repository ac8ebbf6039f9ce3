"""Exact rollouts: completions whose tokens are sampled by the program that scores them.

Decoding only proposes them. The scoring program then samples every token anew, from its own logits of the
proposed text, with the same random number. Where it gets another token, that is put in place, and decoding
proposes the rest from there. The last pass is over the finished text and finds every token as it is: each was
sampled from that pass's logits, whose log-probabilities are the trainer's, the same numbers of the same
program. Proposals and results come from nearly equal logits, so few tokens are changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from llama_jax.errors import DataError

from .sampler import Sampled

# (tokens [R, C], lengths [R]) -> the tokens that the scoring program samples, and their log-probabilities
Verify = Callable[[Sampled], tuple[np.ndarray, np.ndarray]]
# (row numbers, the tokens that their completions begin with, keys) -> completions
Resume = Callable[[Sequence[int], Sequence[Sequence[int]]], Sampled]
# (row number, tokens) -> the length at which the completion ends, or None
End = Callable[[int, Sequence[int]], int | None]


@dataclasses.dataclass(frozen=True)
class Exact:
    """Exact completions.

    Attributes:
      sampled: the completions; their log-probabilities are those of the pass that sampled them.
      passes: how often the batch was scored.
      changed: how many tokens were not as they were proposed.
    """

    sampled: Sampled
    passes: int
    changed: int


def settle(proposed: Sampled, verify: Verify, resume: Resume, end: End) -> Exact:
    """Changes proposed completions into those that `verify` samples.

    Args:
      proposed: completions by decoding.
      verify: samples every token anew.
      resume: decodes the rest of some rows.
      end: tells where a completion ends.

    Raises:
      DataError: if there is no end to it, as the scoring program does not repeat its own results.
    """
    tokens, lengths = proposed.tokens.copy(), proposed.lengths.copy()
    longest, changed = tokens.shape[1], 0
    for passes in range(1, longest + 2):
        choices, logprobs = verify(Sampled(tokens, lengths, proposed.logprobs))
        differs = (choices != tokens) & (np.arange(longest) < lengths[:, None])
        rows = np.flatnonzero(differs.any(1))
        if not len(rows):
            there = np.arange(longest) < lengths[:, None]
            return Exact(Sampled(tokens, lengths, np.where(there, logprobs, 0.0)), passes, changed)
        changed += len(rows)
        unfinished, begun = [], []
        for row in rows:
            place = int(differs[row].argmax())
            tokens[row, place] = choices[row, place]
            tokens[row, place + 1 :] = 0
            lengths[row] = place + 1
            if place + 1 < longest and end(int(row), tokens[row, : place + 1].tolist()) is None:
                unfinished.append(int(row))
                begun.append(tokens[row, : place + 1].tolist())
        if unfinished:
            more = resume(unfinished, begun)
            tokens[unfinished], lengths[unfinished] = more.tokens, more.lengths
    raise DataError(
        f"exact rollouts did not settle in {longest + 1} passes: this device does not repeat its own "
        "results, so leave out train.exact_rollouts"
    )


def keys_of_rows(key: jax.Array, rows: Sequence[int]) -> jax.Array:
    """The keys of rows of a rollout, as decoding and the scoring program derive them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, np.asarray(rows, np.int32))
