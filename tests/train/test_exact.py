"""Exact rollouts: what is settled on is what the scoring program alone would have sampled, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from llama_jax.errors import DataError
from llama_jax.train.rl.exact import settle
from llama_jax.train.rl.sampler import Sampled

ROWS, LONGEST, END = 6, 12, 7


def exact_token(row: int, before: Sequence[int]) -> int:
    """The token that the scoring program samples after others: any function of them."""
    return hash((row, *map(int, before))) % 9


def alone(row: int) -> list[int]:
    """The completion that it samples by itself."""
    tokens: list[int] = []
    while len(tokens) < LONGEST and (not tokens or tokens[-1] != END):
        tokens.append(exact_token(row, tokens))
    return tokens


def proposal(row: int, before: Sequence[int], rate: float, rng: np.random.Generator) -> list[int]:
    """What decoding proposes from there: now and then another token."""
    tokens = list(before)
    while len(tokens) < LONGEST and (not tokens or tokens[-1] != END):
        token = exact_token(row, tokens)
        tokens.append((token + 1) % 9 if rng.random() < rate else token)
    return tokens


def sampled(rows: Sequence[Sequence[int]]) -> Sampled:
    tokens = np.zeros((len(rows), LONGEST), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    lengths = np.array([len(ids) for ids in rows], np.int32)
    return Sampled(tokens, lengths, np.zeros(tokens.shape, np.float32))


def verify(given: Sampled) -> tuple[np.ndarray, np.ndarray]:
    choices = np.zeros_like(given.tokens)
    for row in range(len(choices)):
        for t in range(given.lengths[row]):
            choices[row, t] = exact_token(row, given.tokens[row, :t])
    return choices, -choices.astype(np.float32) - 1


def end(row: int, tokens: Sequence[int]) -> int | None:
    return len(tokens) if tokens[-1] == END else None


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_completions_are_those_of_the_scoring_program_alone(rate):
    rng = np.random.default_rng(3)

    def resume(rows: Sequence[int], begun: Sequence[Sequence[int]]) -> Sampled:
        return sampled([proposal(row, ids, rate, rng) for row, ids in zip(rows, begun, strict=True)])

    proposed = sampled([proposal(row, [], rate, rng) for row in range(ROWS)])
    found = settle(proposed, verify, resume, end)
    expected = sampled([alone(row) for row in range(ROWS)])
    np.testing.assert_array_equal(found.sampled.tokens, expected.tokens)
    np.testing.assert_array_equal(found.sampled.lengths, expected.lengths)
    there = np.arange(LONGEST) < expected.lengths[:, None]
    np.testing.assert_array_equal(found.sampled.logprobs, np.where(there, -expected.tokens - 1.0, 0))
    assert (found.passes == 1) == (found.changed == 0) == (rate == 0)
    assert found.passes <= LONGEST + 1


def test_a_program_that_does_not_repeat_its_results_stops_the_run():
    rng = np.random.default_rng(0)
    unsteady = lambda given: (rng.integers(0, 6, given.tokens.shape), given.logprobs)  # noqa: E731
    resume = lambda rows, begun: sampled([[*ids, *[0] * (LONGEST - len(ids))] for ids in begun])  # noqa: E731
    with pytest.raises(DataError, match="does not repeat its own results, so leave"):
        settle(sampled([[0] * LONGEST] * ROWS), unsteady, resume, lambda *_: None)
