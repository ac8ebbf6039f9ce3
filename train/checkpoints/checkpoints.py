"""Checkpoints of a training run: written by Orbax in the background, verified by checksums when restored.

A step is committed by one rename, after all its files have been hashed into a manifest: a directory with a
step's name is complete, and `restore` checks that its files are still what was written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from llama_jax.config import LlamaConfig
from llama_jax.errors import CheckpointError
from llama_jax.weights import manifest
from llama_jax.weights.orbax import read_tree
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
from .orbax_manager import DELETED, TEMPORARY, error_line, make_manager, silence_save_failures
from .state_tree import check_tree, join_state, split_state

_CLEANUP_ATTEMPTS = 30  # to remove the files of a failed save, 0.1 s apart
_TIME_CHECK_EVERY = 10  # steps between checks of `every_minutes` by several processes: each is a collective


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
        self.folder = Path(run_dir).expanduser().absolute() / CHECKPOINTS
        self.config = config
        self.model = model
        self.run = dict(run or {})
        self.warn = warn
        self._manager: ocp.CheckpointManager | None = None
        self._saving_step: int | None = None
        self._damaged: dict[int, str] = {}
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

    def should_save(self, step: int) -> bool:
        """Whether `step` is due to be saved.

        Raises:
          CheckpointError: if the previous save has failed in the background.
        """
        single_process = jax.process_count() == 1
        if (
            single_process
            and self._saving_step is not None
            and not self._open_manager().is_saving_in_progress()
        ):
            self.wait()
        if self.config.every and step % self.config.every == 0:
            return True
        if not self.config.every_minutes or not (single_process or step % _TIME_CHECK_EVERY == 0):
            return False
        due = time.monotonic() - self._last_save_time >= 60 * self.config.every_minutes
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(due))) if not single_process else due

    def save(
        self, step: int, state: Any, data_state: Any, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Starts saving a step in the background; does nothing if the step is saved already.

        `state` is copied first: it may be donated as soon as this returns.

        Args:
          step: its number.
          state: a dataclass of arrays with a field `params`, a nested dict.
          data_state: the state of this process's data iterator, JSON-serializable.
          metrics: evaluation metrics; `eval_loss` determines the best steps.

        Raises:
          CheckpointError: if this or the previous save cannot be written.
        """
        self.wait()
        self._remove_deleted()
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
        params, rest = split_state(state)
        args = ocp.args.Composite(
            **{
                PARAMS: ocp.args.PyTreeSave(params),
                STATE: ocp.args.PyTreeSave(rest),
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
          CheckpointError: if it cannot be written.
        """
        if self._manager is None or self._saving_step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error
        self._saving_step = None

    def close(self) -> None:
        """Waits for the step being saved, and closes Orbax's manager.

        Raises:
          CheckpointError: if the step being saved cannot be written.
        """
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None
            self._remove_deleted()

    def restore(self, abstract_state: Any) -> Restored | None:
        """Restores the newest intact step, and warns about each damaged step that it skips.

        Args:
          abstract_state: a state with a `jax.ShapeDtypeStruct`, with its sharding, for each array: over any
            mesh and any number of processes.

        Returns:
          The contents of the checkpoint; None if the run has none yet.

        Raises:
          CheckpointError: if every step is damaged, or the step is of another model or optimizer.
        """
        folders = step_folders(self.folder.parent)
        for step, folder in reversed(folders.items()):
            problem = _first_message(_problem(folder, share=(jax.process_index(), jax.process_count())))
            if problem is None:
                if self._damaged:
                    self.warn(f"resuming from step {step}, the newest intact checkpoint")
                return self._read(step, folder, abstract_state)
            self._damaged[step] = problem
            self.warn(f"skipping the checkpoint of step {step}: {problem}")
        if self._damaged:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in self._damaged.items())
            raise CheckpointError(
                f"{self.folder}: every checkpoint is damaged: {listed}; restore one from a backup, or move "
                "the directory away to start over"
            )
        return None

    def _read(self, step: int, folder: Path, abstract_state: Any) -> Restored:
        params, rest = split_state(abstract_state)
        for name, expected in ((PARAMS, params), (STATE, rest)):
            check_tree(folder / name, expected)
        state = join_state(
            abstract_state, read_tree(folder / PARAMS, params), read_tree(folder / STATE, rest)
        )
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
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("llama_jax: damaged checkpoints set aside")
            self._damaged.clear()
            try:
                self._manager = make_manager(self.folder, dataclasses.asdict(self.config))
            except OSError as error:
                raise CheckpointError(f"{self.folder}: cannot be written: {error_line(error)}") from error
        return self._manager

    def _remove_temporary(self) -> None:
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
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def _save_error(self, error: Exception) -> CheckpointError:
        """Cleans up after a failed save, and makes the error."""
        step, self._saving_step, self._manager, self._restore_logging = self._saving_step, None, None, None
        if jax.process_index() == 0:
            self._remove_temporary()
        saved = self.steps()
        earlier = (
            f"the earlier checkpoints are intact, the newest is of step {saved[-1]}"
            if saved
            else "there are no earlier ones"
        )
        return CheckpointError(
            f"checkpoint of step {step} could not be written to {self.folder}: {error_line(error)}; "
            f"{earlier}; free some space or choose another train.run_dir, and run the same command again to "
            "resume"
        )


def _problem(folder: Path, *, quick: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    try:
        manifest.verify(folder, quick=quick, shard=share)
        read_step_metadata(folder)
    except CheckpointError as error:
        return str(error)
    return None


def _first_message(problem: str | None) -> str | None:
    """Returns the problem of the first process that has one, in every process."""
    if jax.process_count() == 1:
        return problem
    buffer = np.zeros(400, np.uint8)
    text = (problem or "").encode()[: buffer.size]
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    for row in multihost_utils.process_allgather(buffer):
        if message := row.tobytes().rstrip(b"\0").decode(errors="replace"):
            return message
    return None
