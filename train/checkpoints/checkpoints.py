"""Checkpoints of a training run: written by Orbax in the background, verified when restored.

A step is committed by one rename, after all its files are listed in a manifest: a directory with a step's
name is complete. The arrays' digests are computed on the devices, when they are saved and again when they are
restored: each process reads the shards of its devices, once, and all find the same damage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError, CheckpointSaveError, StoreError
from llama_jax.storage import StorePath, as_path, local_file
from llama_jax.weights import digests, manifest
from llama_jax.weights.orbax_tree import read_verified
from llama_jax.weights.processes import first_problem
from llama_jax.weights.runs import (
    CHECKPOINTS,
    DAMAGED_SUFFIX,
    DATA,
    PARAMS,
    RUN,
    STATE,
    read_step_metadata,
    step_folders,
)

from ..config.checkpoint import CheckpointConfig
from .local_copies import LocalCopies
from .object_steps import remove_uncommitted, remove_unretained
from .orbax_manager import DELETED, TEMPORARY, make_manager, save_args, silence_save_failures
from .save_errors import save_error
from .state_tree import check_tree, join_state, residual_parts, split_state

_CLEANUP_ATTEMPTS = 30  # to remove the files of a failed save, 0.1 s apart


@dataclasses.dataclass(frozen=True)
class Restored:
    """The contents of a checkpoint.

    Attributes:
      step: its step.
      state: the training state, with the requested shardings.
      data_states: the data state of every process that saved, in process order.
      metrics: evaluation metrics of this step.
      run: the `run` metadata of `Checkpoints`.
    """

    step: int
    state: Any
    data_states: list[Any]
    metrics: Mapping[str, float]
    run: Mapping[str, Any]


class Checkpoints:
    """A run's checkpoints; every process of the run creates one and calls the same methods in the same order.

    Args:
      run_dir: the run's directory, on a file system shared by all processes.
      config: when steps are saved and which are retained.
      model: the model's configuration; `load` needs it to read the parameters.
      run: metadata that `restore` returns, JSON-serializable: fingerprints, settings.
      warn: called with a message about each damaged step that is skipped.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: CheckpointConfig,
        *,
        model: LlamaConfig,
        run: Mapping[str, Any] | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = as_path(run_dir).expanduser().absolute() / CHECKPOINTS
        self.config = config
        self.model = model
        self.run = dict(run or {})
        self.warn = warn
        self._manager: ocp.CheckpointManager | None = None
        self._saving_step: int | None = None
        self._digests: dict[str, Mapping[str, Any]] = {}  # by item, of the step being saved
        self._nbytes = 0  # of a step
        self._copies = LocalCopies(config.local_dir, self.folder, warn) if config.local_every else None
        self._copy_step: int | None = None  # the step of which a copy is due, and no checkpoint
        self._damaged: dict[int, str] = {}
        self._background_errors: list[BaseException] = []
        self._last_save_time = time.monotonic()
        self._restore_logging: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        self._restore_logging = silence_save_failures()
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            self.close()
        except CheckpointError:
            if error is None:
                raise
        finally:
            if self._restore_logging is not None:
                self._restore_logging()

    def steps(self) -> list[int]:
        """Returns the saved steps whose files have the right names and sizes, oldest first."""
        return [step for step, problem in self._quick_check().items() if problem is None]

    def is_time(self) -> bool:
        """Whether `every_minutes` have passed since the last save, by this process's clock."""
        minutes = self.config.every_minutes
        return bool(minutes) and time.monotonic() - self._last_save_time >= 60 * minutes

    def should_save(self, step: int, *, is_time: bool = False) -> bool:
        """Whether `step` is due to be saved.

        Args:
          step: its number.
          is_time: `is_time` of process 0, as all processes have agreed; a single one need not say so.

        Raises:
          CheckpointSaveError: if the previous save has failed in the background.
        """
        single_process = jax.process_count() == 1
        if (
            single_process
            and self._saving_step is not None
            and not self._open_manager().is_saving_in_progress()
        ):
            self.wait()
        if self._background_errors:  # of this process alone: the others still wait for its part
            raise self._save_error(self._background_errors[0])
        if self.config.every and step % self.config.every == 0:
            return True
        if self.is_time() if single_process else is_time:
            return True
        if self._copies is not None and step % self.config.local_every == 0:
            self._copy_step = step
            return True
        return False

    def save(
        self, step: int, state: Any, data_state: Any, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts saving a step in the background; does nothing if the step is saved already.

        Where `should_save` said so for a copy on the hosts, and no checkpoint is due, only that is written.
        `state` is copied first: it may be donated as soon as this returns.

        Args:
          step: its number.
          state: a dataclass of arrays with a field `params`, a nested dict.
          data_state: the state of this process's data iterator, JSON-serializable.
          metrics: evaluation metrics; `eval_loss` determines the best steps.

        Raises:
          CheckpointSaveError: if this or the previous save cannot be written.
        """
        copy_step, self._copy_step = self._copy_step, None
        if self._copies is not None and copy_step == step:
            about = {"run": self.run, "metrics": dict(metrics or {})}
            self._copies.save(step, state, about, data_state)
            return
        self.wait()
        self._remove_deleted()
        params, rest = split_state(state)
        self._nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves((params, rest)))
        manager = self._open_manager()
        if step in manager.all_steps():
            return
        record = {
            "step": step,
            "time": time.time(),
            "model": dataclasses.asdict(self.model),
            "keep": dataclasses.asdict(self.config),
            "run": self.run,
        }
        self._digests = {PARAMS: digests.start(params), STATE: digests.start(rest)}
        args = ocp.args.Composite(
            **{
                PARAMS: save_args(params),
                STATE: save_args(rest),
                DATA: ocp.args.JsonSave(data_state),
                RUN: ocp.args.JsonSave(record),
            }
        )
        float_metrics = {name: float(value) for name, value in (metrics or {}).items()}
        self._saving_step = step
        try:
            manager.save(step, args=args, metrics=float_metrics, force=True)
        except Exception as error:
            raise self._save_error(error) from error
        self._last_save_time = time.monotonic()
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits until the step being saved is committed.

        Raises:
          CheckpointSaveError: if it cannot be written.
        """
        if self._manager is None or self._saving_step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error
        self._saving_step = None
        if isinstance(self.folder, StorePath) and jax.process_index() == 0:
            remove_unretained(self.folder)

    def close(self) -> None:
        """Waits for the step being saved, and closes Orbax's manager.

        Raises:
          CheckpointSaveError: if the step being saved cannot be written.
        """
        if self._copies is not None:
            self._copies.wait()
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None
            self._remove_deleted()

    def restore(
        self,
        abstract_state: Any,
        may_differ: Callable[[str], bool] = lambda _: False,
        with_parts: Callable[[Any, int], Any] = lambda state, _: state,
    ) -> Restored | None:
        """Restores the newest intact step, and warns about each damaged step that it skips.

        Args:
          abstract_state: a state with a `jax.ShapeDtypeStruct`, with its sharding, for each array: over any
            mesh and any number of processes.
          may_differ: whether a leaf of this name, beside the parameters, may be missing in the step, in which
            case it is zero, or be left over there.
          with_parts: the state to restore for `abstract_state` and the number of parts that the residual of
            gradients has in the step; 0 is none.

        Returns:
          The contents of the checkpoint; None if the run has none yet.

        Raises:
          CheckpointError: if every step is damaged, or the step is of another model or optimizer.
        """
        folders = step_folders(self.folder.parent)
        share = (jax.process_index(), jax.process_count())
        if self._copies is not None:
            newest, run = max(folders, default=0), json.loads(json.dumps(self.run))
            if (copied := self._copies.restore(newest, abstract_state, run)) is not None:
                state, record = copied
                return Restored(record["step"], state, record["data"], record["metrics"], record["run"])
        for step, folder in reversed(folders.items()):
            problem = first_problem(_problem(folder, share=share))
            if problem is None:
                wanted = with_parts(abstract_state, residual_parts(folder / STATE))
                missing = self._check(folder, wanted, may_differ)
                try:
                    restored = self._read(step, folder, wanted, missing)
                except CheckpointError as error:
                    problem = str(error)
                else:
                    if self._damaged:
                        self.warn(f"resuming from step {step}, the newest intact checkpoint")
                    return restored
            self._damaged[step] = problem
            self.warn(f"skipping the checkpoint of step {step}: {problem}")
        if self._damaged:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in self._damaged.items())
            raise CheckpointError(
                f"{self.folder}: every checkpoint is damaged: {listed}; restore one from a backup, or move "
                "the directory away to start over"
            )
        return None

    def _check(self, folder: Path, abstract_state: Any, may_differ: Callable[[str], bool]) -> set[str]:
        """Checks names, shapes and dtypes; returns the names of the state's leaves that the step has not."""
        params, rest = split_state(abstract_state)
        check_tree(folder / PARAMS, params)
        return check_tree(folder / STATE, rest, may_differ)

    def _read(self, step: int, folder: Path, abstract_state: Any, missing: set[str]) -> Restored:
        params, rest = split_state(abstract_state)
        zeros = {
            name: jnp.zeros(x.shape, x.dtype, device=x.sharding)
            for name, x in rest.items()
            if name in missing
        }
        leaves = read_verified(folder / STATE, {name: x for name, x in rest.items() if name not in missing})
        state = join_state(abstract_state, read_verified(folder / PARAMS, params), {**leaves, **zeros})
        record = read_step_metadata(folder)
        data_files = sorted((folder / DATA).glob("process_*.json"), key=lambda path: int(path.stem[8:]))
        return Restored(
            step, state, [json.loads(path.read_text()) for path in data_files], record.metrics, record.run
        )

    def _quick_check(self) -> dict[int, str | None]:
        """Returns the problem of each step, or None, judging by names, sizes and small files only."""
        problems: dict[int, str | None] = {}
        for step, folder in step_folders(self.folder.parent).items():
            problems[step] = self._damaged.get(step) or _problem(folder, quick=True)
        return problems

    def _open_manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            # Orbax reads every step at first, counts it towards retention, and replaces one of the same name.
            if jax.process_index() == 0:
                for step, problem in self._quick_check().items():
                    if problem is not None:
                        self._set_aside(step, problem)
                self._remove_deleted()
                if isinstance(self.folder, StorePath):
                    remove_uncommitted(self.folder)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("llama_jax: damaged checkpoints set aside")
            self._damaged.clear()
            try:
                self._manager = make_manager(
                    self.folder,
                    dataclasses.asdict(self.config),
                    self._background_errors.append,
                    nbytes=self._nbytes,
                    pending_digests=lambda item: self._digests.get(item, {}),
                )
            except Exception as error:  # of two libraries under Orbax
                failed = save_error(self.folder, None, error, self.steps)
                if isinstance(error, OSError) or not failed.transient:
                    raise failed from error
                raise
        return self._manager

    def _remove_temporary(self) -> None:
        if isinstance(self.folder, StorePath):
            remove_uncommitted(self.folder)
            return
        # Orbax's other writers may still be creating files while these are removed.
        for _ in range(_CLEANUP_ATTEMPTS):
            paths = list(self.folder.glob(f"*{TEMPORARY}*"))
            if not paths:
                return
            for path in paths:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.1)

    def _set_aside(self, step: int, problem: str) -> None:
        """Renames a damaged step, so that its step can be saved again; deletes nothing."""
        target = self.folder / f"{step}{DAMAGED_SUFFIX}"
        count = 1
        while target.exists():
            count += 1
            target = self.folder / f"{step}{DAMAGED_SUFFIX}-{count}"
        (self.folder / str(step)).rename(target)
        if step not in self._damaged:
            self.warn(f"skipping the checkpoint of step {step}: {problem}")
        self.warn(
            f"the damaged checkpoint of step {step} was renamed to {target}; delete it if it is not needed"
        )

    def _remove_deleted(self) -> None:
        # Orbax first renames steps that are no longer retained, so that a kill leaves no partial step.
        if jax.process_index() == 0 and local_file(self.folder):
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def _save_error(self, error: BaseException) -> CheckpointSaveError:
        """Cleans up after a failed save, and makes the error."""
        step, self._saving_step, self._manager, self._restore_logging = self._saving_step, None, None, None
        if jax.process_index() == 0:
            with contextlib.suppress(StoreError):  # which may refuse this too
                self._remove_temporary()
        return save_error(self.folder, step, error, self.steps)


def _problem(folder: Path, *, quick: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    try:
        manifest.verify(folder, quick=quick, shard=share)
        read_step_metadata(folder)
    except CheckpointError as error:
        return str(error)
    return None
