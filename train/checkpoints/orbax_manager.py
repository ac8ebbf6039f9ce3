"""Orbax's CheckpointManager, with a checksum manifest as part of the commit.

Orbax writes asynchronously, each process its own shards, commits a step by a rename, and applies retention
policies. Added here: all files are hashed before the rename, so a directory with a step's name is complete.
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
from llama_jax.weights.orbax import silence_orbax_log
from llama_jax.weights.runs import DATA, PARAMS, RUN, STATE, STEP_METADATA_FILE, keep_policies

DELETED = "deleted"  # the directory that Orbax moves steps to that are no longer retained
TEMPORARY = atomicity.TMP_DIR_SUFFIX  # part of the name of a step that is not committed yet


def make_manager(folder: Path, keep: Mapping[str, float]) -> ocp.CheckpointManager:
    """Makes the manager of a run's checkpoints.

    Args:
      folder: the directory of the steps.
      keep: the retention settings, as for `keep_policies`.
    """
    per_process = ocp.options.MultiprocessingOptions(primary_host=None)  # every process writes its own file
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in (PARAMS, STATE):
        registry.add(name, ocp.args.PyTreeSave, _HashedTree(use_compression=False))
    data = ocp.JsonCheckpointHandler(
        f"process_{jax.process_index()}.json", multiprocessing_options=per_process
    )
    registry.add(DATA, ocp.args.JsonSave, data)
    registry.add(RUN, ocp.args.JsonSave, ocp.JsonCheckpointHandler(STEP_METADATA_FILE))
    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(list(keep_policies(keep).values())),
            best_fn=lambda metrics: metrics,  # needed for metrics to be saved; the policies select the best
            cleanup_tmp_directories=True,
            todelete_subdir=DELETED,
            temporary_path_class=_HashedPath,
        ),
        handler_registry=registry,
    )


class _HashedPath(atomicity.AtomicRenameTemporaryPath):
    """Orbax's commit by rename in two steps: to a second temporary name, and after hashing to the final one.

    So the manifest covers all files, even those that Orbax writes last.
    """

    async def finalize(self) -> None:
        final = self._final_path  # type: ignore[has-type]  # private: tests/test_private_seams.py
        unhashed = final.parent / f"{final.name}{atomicity.TMP_DIR_SUFFIX}-unsealed"
        self._final_path = unhashed
        try:
            await super().finalize()
        finally:
            self._final_path = final
        manifest.write_manifest(Path(unhashed))
        unhashed.rename(final)


class _HashedTree(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of trees; each process hashes the shards that it wrote, so that none reads them all."""

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> Any:
        written = await super().async_save(directory, *args, **kwargs)
        # private: tests/test_private_seams.py
        shards = Path(directory) / f"ocdbt.process_{jax.process_index()}"
        return [
            *(written or ()),
            _DeferredWork(lambda: manifest.write_manifest(shards) if shards.is_dir() else None),
        ]


@dataclasses.dataclass(frozen=True)
class _DeferredWork:
    """A future whose work runs when Orbax waits for it, after the futures before it."""

    work: Callable[[], Any]

    def result(self, timeout: float | None = None) -> None:
        self.work()

    def cancel(self) -> None:
        return None


_PERMANENT: list[contextlib.AbstractContextManager[None]] = []


def silence_save_failures() -> Callable[[], None]:
    """Suppresses the messages that a failed save prints on stderr besides raising its error.

    The first tensor that cannot be written closes Orbax's event loop under the others, and each of them fails
    in its own way: a logged traceback, an unraisable exception, a warning.

    Returns:
      A function that undoes it; do not call it after a failure, since the last messages come at exit.
    """
    logger, hook, stack = logging.getLogger("asyncio"), sys.unraisablehook, contextlib.ExitStack()

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        if not (isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"):
            hook(args)

    def is_other(record: logging.LogRecord) -> bool:
        return "never retrieved" not in record.getMessage()

    silent = silence_orbax_log()
    silent.__enter__()
    stack.callback(silent.__exit__, None, None, None)
    _PERMANENT.append(silent)  # a collected context would end, and after a failure it must last until exit
    logger.addFilter(is_other)
    stack.callback(logger.removeFilter, is_other)
    sys.unraisablehook = unraisable
    stack.callback(setattr, sys, "unraisablehook", hook)
    warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)
    return stack.close


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
