"""Orbax's CheckpointManager, with digests of the arrays and a manifest of the files as part of the commit.

Orbax writes asynchronously, each process its own shards, commits a step by a rename, and applies retention
policies. Added here: all files are listed before the rename, so a directory with a step's name is complete.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies
from orbax.checkpoint.path import atomicity, atomicity_types

from llama_jax.storage import StorePath, as_path
from llama_jax.weights import digests, manifest
from llama_jax.weights.orbax_paths import orbax_path
from llama_jax.weights.orbax_tree import silence_orbax_log
from llama_jax.weights.runs import DATA, PARAMS, RUN, STATE, STEP_METADATA_FILE, keep_policies

DELETED = "deleted"  # the directory that Orbax moves steps to that are no longer retained
CHUNK_BYTES = 16 << 20  # of the arrays in files, at most
_DEADLINE_SECONDS = 1200
_MINIMUM_RATE = 100e6  # bytes per second, of all processes together
TEMPORARY = atomicity_types.TMP_DIR_SUFFIX  # part of the name of a step that is not committed yet


def make_manager(
    folder: Path,
    keep: Mapping[str, float],
    on_error: Callable[[BaseException], None],
    *,
    nbytes: int,
    pending_digests: Callable[[str], Mapping[str, Any]],
) -> ocp.CheckpointManager:
    """Makes the manager of a run's checkpoints.

    Args:
      folder: the directory of the steps. In an object store nothing is deleted: see object_steps.py.
      keep: the retention settings, as for `keep_policies`.
      on_error: of several processes, called with the error of this one's part of a save, in a thread.
      nbytes: the size of a step, which its deadline follows.
      pending_digests: returns the digests of the arrays of an item, PARAMS or STATE, of the step being saved.
    """
    per_process = ocp.options.MultiprocessingOptions(primary_host=None)  # every process writes its own file
    stored = isinstance(folder, StorePath)
    keeps = [policies.EveryNSteps(1)] if stored else list(keep_policies(keep).values())
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in (PARAMS, STATE):
        registry.add(name, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
    data = ocp.JsonCheckpointHandler(
        f"process_{jax.process_index()}.json", multiprocessing_options=per_process
    )
    registry.add(DATA, ocp.args.JsonSave, data)
    registry.add(RUN, ocp.args.JsonSave, ocp.JsonCheckpointHandler(STEP_METADATA_FILE))
    return ocp.CheckpointManager(
        orbax_path(folder),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(keeps),
            best_fn=lambda metrics: metrics,  # needed for metrics to be saved; the policies select the best
            cleanup_tmp_directories=not stored,
            todelete_subdir=None if stored else DELETED,
            temporary_path_class=(_sealed_objects if stored else _sealed_path)(pending_digests),
            async_options=ocp.AsyncOptions(timeout_secs=deadline(nbytes), barrier_sync_fn=_barrier(on_error)),
        ),
        handler_registry=registry,
    )


def deadline(nbytes: int) -> int:
    """Returns the seconds after which a save in the background fails: 20 minutes, and 1 s per 100 MB."""
    return _DEADLINE_SECONDS + math.ceil(nbytes / _MINIMUM_RATE)


def save_args(tree: Any) -> Any:
    """Returns Orbax's arguments to save a tree in chunks that other meshes can read in part.

    Orbax stores each shard as one chunk, and reading a part of a chunk reads all of it. Larger shards are
    split, first along the dimensions that are sharded.
    """
    args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    return ocp.args.PyTreeSave(tree, save_args=args)


def _barrier(on_error: Callable[[BaseException], None]) -> Callable[..., None] | None:
    """Orbax's barrier for several processes, at which one that has failed does not wait for the others.

    Orbax would, for 20 minutes, although they wait elsewhere for what this one was to write.
    """
    if jax.process_count() == 1:
        return None
    wait = ocp.multihost.get_barrier_sync_fn()

    def wait_unless_failed(*, key: str, timeout_ms: int) -> None:
        error = sys.exception()
        if error is not None:
            on_error(error)
            raise error
        wait(key=key, timeout_ms=timeout_ms)

    return wait_unless_failed


def _sealed_path(
    pending_digests: Callable[[str], Mapping[str, Any]],
) -> type[atomicity_types.TemporaryPath]:
    """Returns the class that commits the directory of a step, or of one of its items.

    Orbax's commit by rename, in two steps: to a second temporary name, and when digests and manifest are
    written to the final one. So the manifest covers all files, even those that Orbax writes last.
    """

    class SealedPath(atomicity_types.TemporaryPath):
        def __init__(self, path: atomicity_types.TemporaryPath, final: Any) -> None:
            self._path, self._final = path, final

        @classmethod
        async def validate(cls, temporary_path: Any) -> None:
            await atomicity.AtomicRenameTemporaryPath.validate(temporary_path)

        @classmethod
        async def validate_final(cls, final_path: Any) -> None:
            await atomicity.AtomicRenameTemporaryPath.validate_final(final_path)

        @classmethod
        def from_temporary(cls, temporary_path: Any, **options: Any) -> SealedPath:
            path = atomicity.AtomicRenameTemporaryPath.from_temporary(temporary_path, **options)
            return cls(path, path.get_final())

        @classmethod
        def from_final(cls, final_path: Any, **options: Any) -> SealedPath:
            temporary = final_path.parent / f"{final_path.name}{TEMPORARY}"
            unsealed = final_path.parent / f"{final_path.name}{TEMPORARY}-unsealed"
            path = atomicity.AtomicRenameTemporaryPath(temporary, unsealed, **options)
            return cls(path, final_path)

        def get(self) -> Any:
            return self._path.get()

        def get_final(self) -> Any:
            return self._final

        async def create(self) -> Any:
            return await self._path.create()

        async def finalize(self) -> None:
            await self._path.finalize()
            unsealed = self._path.get_final()
            _seal(Path(unsealed), pending_digests(self._final.name))
            unsealed.rename(self._final)

    return SealedPath


def _sealed_objects(pending_digests: Callable[[str], Mapping[str, Any]]) -> Any:
    """The same where there is no rename: Orbax's commit by a marker, and the manifest, written after it."""

    class SealedObjects(atomicity.CommitFileTemporaryPath):
        async def finalize(self) -> None:
            await super().finalize()
            _seal(as_path(str(self.get_final())), pending_digests(self.get_final().name))

    return SealedObjects


def _seal(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Writes the digests of an item's arrays, if it has any, and the manifest."""
    if arrays:
        digests.write(folder, arrays)
    manifest.write_manifest(folder, arrays_have_digests=bool(arrays))


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
