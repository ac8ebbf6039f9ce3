"""What a checkpoint that could not be written is reported as: one line, with what is left and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from llama_jax.errors import CheckpointSaveError, StoreError
from llama_jax.storage.refusal import refusal


def save_error(
    folder: Path, step: int | None, error: BaseException, saved: Callable[[], list[int]]
) -> CheckpointSaveError:
    """Returns the error for a step; transient unless a store has refused for good.

    Args:
      folder: where checkpoints are saved.
      step: the step that was not written, None if the folder could not be opened.
      error: what Orbax or a store raised.
      saved: returns the steps that are saved.
    """
    refused = refusal(folder, error)
    transient = refused is None
    line = error_line(error) if transient else str(refused)
    if step is None:
        return CheckpointSaveError(
            f"{folder}: cannot be written: {line}" if transient else line, transient=transient
        )
    where = f" to {folder}" if transient else ""
    fix = "free some space or choose another train.run_dir, and " if transient else ""
    return CheckpointSaveError(
        f"checkpoint of step {step} could not be written{where}: {line}; {_earlier(saved)}; {fix}run the "
        "same command again to resume",
        transient=transient,
    )


def _earlier(saved: Callable[[], list[int]]) -> str:
    steps: list[int] | None = None
    with contextlib.suppress(StoreError):  # which may refuse this too
        steps = saved()
    if steps is None:
        return "the earlier ones are as they were"
    if steps:
        return f"the earlier checkpoints are intact, the newest is of step {steps[-1]}"
    return "there are no earlier ones"


def error_line(error: BaseException) -> str:
    """Returns the cause of an error in one line: the operating system's message if there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(error).split())
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
        if re.search(re.escape(os.strerror(number)), text, re.IGNORECASE):
            return os.strerror(number)
    return text[:300] or type(error).__name__
