"""Agreement of the processes that read a checkpoint together: a problem of one is an error in all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from llama_jax.errors import CheckpointError

_MAX_BYTES = 400  # of a message that is exchanged


def first_problem(problem: str | None) -> str | None:
    """Returns the problem of the first process that has one, in every process; all of them call it."""
    if jax.process_count() == 1:
        return problem
    buffer = np.zeros(_MAX_BYTES, np.uint8)
    text = (problem or "").encode()[:_MAX_BYTES]
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    for row in multihost_utils.process_allgather(buffer):
        if message := row.tobytes().rstrip(b"\0").decode(errors="replace"):
            return message
    return None


@contextlib.contextmanager
def raised_by_all(shared: bool) -> Iterator[None]:
    """Raises the `CheckpointError` of any process in all of them, at the end of the block.

    Args:
      shared: whether all processes run the block; otherwise nothing is exchanged.
    """
    problem = None
    try:
        yield
    except CheckpointError as error:
        if not shared:
            raise
        problem = str(error)
    if shared and (first := first_problem(problem)) is not None:
        raise CheckpointError(first)
