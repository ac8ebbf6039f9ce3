"""Orbax's CheckpointManager with our manifest in its commit.

What Orbax offers: writing beside the training, every process its own part, a commit by rename, and steps
kept by rules. What is added: everything is hashed before the rename, so that what has a step's name is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import atomicity

from llama_jax.weights import manifest
from llama_jax.weights.orbax import quiet
from llama_jax.weights.runs import DATA, PARAMS, RECORD, RUN, STATE, keep_policies

DELETED = "deleted"  # where Orbax moves steps that are no longer kept
TEMPORARY = atomicity.TMP_DIR_SUFFIX  # a part of the names of steps that are not committed yet


def make_manager(folder: Path, keep: Mapping[str, float]) -> ocp.CheckpointManager:
    """Makes the manager of a run's checkpoints.

    Args:
      folder: where the steps are.
      keep: which of them stay, as `keep_policies` takes it.
    """
    here = ocp.options.MultiprocessingOptions(primary_host=None)  # every process writes a file of its own
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in (PARAMS, STATE):
        registry.add(name, ocp.args.PyTreeSave, _HashedTree(use_compression=False))
    data = ocp.JsonCheckpointHandler(f"process_{jax.process_index()}.json", multiprocessing_options=here)
    registry.add(DATA, ocp.args.JsonSave, data)
    registry.add(RUN, ocp.args.JsonSave, ocp.JsonCheckpointHandler(RECORD))
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(list(keep_policies(keep).values())),
            best_fn=lambda metrics: metrics,  # has the metrics written; the policies say which is best
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,
            temporary_path_class=_SealedPath,
        ),
        handler_registry=registry,
    )


class _SealedPath(atomicity.AtomicRenameTemporaryPath):
    """Orbax's commit by rename, in two steps: to a second temporary name, and when sealed to the final one.

    The manifest can so cover everything, even what Orbax writes last.
    """

    async def finalize(self) -> None:
        final = self._final_path  # type: ignore[has-type]
        unsealed = final.parent / f"{final.name}{atomicity.TMP_DIR_SUFFIX}-unsealed"
        self._final_path = unsealed
        try:
            await super().finalize()
        finally:
            self._final_path = final
        manifest.write_manifest(Path(unsealed))
        unsealed.rename(final)


class _HashedTree(ocp.PyTreeCheckpointHandler):
    """Orbax's trees; each process hashes the arrays that it has written, so that none reads all of them."""

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> Any:
        written = await super().async_save(directory, *args, **kwargs)
        share = Path(directory) / f"ocdbt.process_{jax.process_index()}"
        return [*(written or ()), _Then(lambda: manifest.write_manifest(share) if share.is_dir() else None)]


@dataclasses.dataclass(frozen=True)
class _Then:
    """What Orbax waits for after it has waited for the futures before: work to do at that time."""

    work: Callable[[], Any]

    def result(self, timeout: float | None = None) -> None:
        self.work()

    def cancel(self) -> None:
        return None


_FOR_EVER: list[contextlib.AbstractContextManager[None]] = []


def silence() -> Callable[[], None]:
    """Keeps off stderr what a failed save leaves behind, beside the one error that is raised.

    The first tensor that cannot be written ends Orbax's event loop under the others, and each of them
    complains in its own way: a log with a traceback, an exception that nothing catches, a warning.

    Returns:
      A function that undoes it; after a failure don't, since the last complaints come at exit.
    """
    logger, hook, stack = logging.getLogger("asyncio"), sys.unraisablehook, contextlib.ExitStack()

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"):
            hook(what)

    def retrieved(record: logging.LogRecord) -> bool:
        return "never retrieved" not in record.getMessage()

    silent = quiet()
    silent.__enter__()
    stack.callback(silent.__exit__, None, None, None)
    _FOR_EVER.append(silent)  # collected, it would end: after a failure it is to last as long as the process
    logger.addFilter(retrieved)
    stack.callback(logger.removeFilter, retrieved)
    sys.unraisablehook = unraisable
    stack.callback(setattr, sys, "unraisablehook", hook)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
    return stack.close


def one_line(error: BaseException) -> str:
    """Returns what went wrong, in the operating system's words where it was the first to say."""
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
