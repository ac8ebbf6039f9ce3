"""Removes what a failed start has left in a run's directory, where it would be in the way of the next one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from llama_jax.eval.goodput import GOODPUT_FILE
from llama_jax.weights.runs import step_folders

from .metrics.report import EVALUATIONS, METRICS
from .provenance import CONFIG_FILE
from .tokenizer import TOKENIZER_FILES


@contextlib.contextmanager
def discarded_unless_begun(run_dir: Path) -> Iterator[None]:
    """On an exception before a first step: removes the files that were written into `run_dir` since.

    These are the configuration, the tokenizer and empty logs. Files that were there before stay.
    """
    names = (CONFIG_FILE, METRICS, EVALUATIONS, GOODPUT_FILE, *TOKENIZER_FILES)
    before = {name for name in names if (run_dir / name).exists()}
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):  # what cannot be removed stays
            if not step_folders(run_dir) and not _has_metrics(run_dir):
                for name in set(names) - before:
                    (run_dir / name).unlink(missing_ok=True)
        raise


def _has_metrics(run_dir: Path) -> bool:
    path = run_dir / METRICS
    return path.exists() and path.stat().st_size > 0
