"""Checkpoints of a training run: saved by Orbax beside the training, sealed by checksums, read back whole.

A step is committed by one rename, after everything in it has been hashed into its manifest: what has a
step's name is complete, and `restore` finds out whether it still is what was written.
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
from llama_jax.weights.runs import CHECKPOINTS, DAMAGED, DATA, PARAMS, RUN, STATE, read_record, step_folders

from ..config.checkpoint import CheckpointConfig
from .orbax_manager import DELETED, TEMPORARY, make_manager, one_line, silence
from .state_tree import compare_tree, join_state, split_state

_TRIES = 30  # of a tenth of a second, to remove what a failed save has left
_CLOCK_EVERY = 10  # steps between looks at the clock where processes must agree on it


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint gives back.

    Attributes:
      step: the number it was saved under.
      state: as it was saved, laid out as it was asked for.
      data_states: of every process that saved, in their order.
      metrics: what was measured at this step.
      run: what was noted of the run.
    """

    step: int
    state: Any
    data_states: list[Any]
    metrics: Mapping[str, float]
    run: Mapping[str, Any]


class Checkpoints:
    """A run's checkpoints; every process of the run makes one and calls the same methods in the same order.

    Args:
      run_dir: the run's directory, on a file system that all processes see.
      config: when steps are saved and which stay.
      model: what is trained; `load` needs it to read the parameters.
      run: notes that come back from `restore`, as JSON has them: fingerprints, settings.
      warn: called with a line about each step that is damaged and not used.
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
        self._writing: int | None = None
        self._damaged: dict[int, str] = {}
        self._saved_at = time.monotonic()
        self._unsilence: Callable[[], None] | None = None

    def __enter__(self) -> Self:
        self._unsilence = silence()
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        try:
            self.close()
        except CheckpointError:
            if error is None:
                raise
        finally:
            if self._unsilence is not None:
                self._unsilence()

    def steps(self) -> list[int]:
        """Returns the steps that are saved and, as far as names and sizes tell, whole; oldest first."""
        return [step for step, problem in self._survey().items() if problem is None]

    def should_save(self, step: int) -> bool:
        """Whether it is time to save `step`.

        Raises:
          CheckpointError: if the save before has failed in the meantime.
        """
        alone = jax.process_count() == 1
        if alone and self._writing is not None and not self._open().is_saving_in_progress():
            self.wait()
        if self.config.every and step % self.config.every == 0:
            return True
        if not self.config.every_minutes or not (alone or step % _CLOCK_EVERY == 0):
            return False
        due = time.monotonic() - self._saved_at >= 60 * self.config.every_minutes
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(due))) if not alone else due

    def save(
        self, step: int, state: Any, data_state: Any, metrics: Mapping[str, float] | None = None
    ) -> None:
        """Begins to save a step; one that is saved already is left as it is.

        The values are those of this moment: `state` may be donated as soon as this returns.

        Args:
          step: its number.
          state: a dataclass with `params`, a nested dict, and other fields, of arrays all of them.
          data_state: where this process is in its data, as JSON has it.
          metrics: what was measured; `eval_loss` decides which steps are best.

        Raises:
          CheckpointError: if this or the save before cannot be written.
        """
        self.wait()
        self._empty_deleted()
        manager = self._open()
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
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        self._writing = step
        try:
            manager.save(step, args=args, metrics=numbers, force=True)
        except Exception as error:
            raise self._failed(error) from error
        self._saved_at = time.monotonic()
        if not self.config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Waits until the step being saved is committed.

        Raises:
          CheckpointError: if it cannot be written.
        """
        if self._manager is None or self._writing is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._writing = None

    def close(self) -> None:
        """Waits for what is being saved, and lets go of everything.

        Raises:
          CheckpointError: if the step being saved cannot be written.
        """
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None
            self._empty_deleted()

    def restore(self, abstract_state: Any) -> Restored | None:
        """Reads the newest step whose files are what was written; says so of each that is passed over.

        Args:
          abstract_state: a state with a `jax.ShapeDtypeStruct`, sharding included, for each array: on any
            mesh, of any number of processes.

        Returns:
          What was saved; None in a run that has not saved yet.

        Raises:
          CheckpointError: if every step is damaged, or the step holds another model or optimizer.
        """
        folders = step_folders(self.folder.parent)
        for step, folder in reversed(folders.items()):
            problem = _first(_problem(folder, share=(jax.process_index(), jax.process_count())))
            if problem is None:
                if self._damaged:
                    self.warn(f"going back to step {step}, the newest checkpoint that is whole")
                return self._read(step, folder, abstract_state)
            self._damaged[step] = problem
            self.warn(f"checkpoint of step {step} is not used: {problem}")
        if self._damaged:
            listed = "; ".join(f"step {step}: {problem}" for step, problem in self._damaged.items())
            raise CheckpointError(
                f"{self.folder}: every checkpoint is damaged: {listed}; restore one from a copy, or move the "
                "directory away to begin again"
            )
        return None

    def _read(self, step: int, folder: Path, abstract_state: Any) -> Restored:
        params, rest = split_state(abstract_state)
        for name, wanted in ((PARAMS, params), (STATE, rest)):
            compare_tree(folder / name, wanted)
        state = join_state(
            abstract_state, read_tree(folder / PARAMS, params), read_tree(folder / STATE, rest)
        )
        record = read_record(folder)
        names = sorted((folder / DATA).glob("process_*.json"), key=lambda path: int(path.stem[8:]))
        return Restored(
            step, state, [json.loads(path.read_text()) for path in names], record.metrics, record.run
        )

    def _survey(self) -> dict[int, str | None]:
        """Returns what is wrong with each step, as far as names, sizes and small files tell."""
        found: dict[int, str | None] = {}
        for step, folder in step_folders(self.folder.parent).items():
            found[step] = self._damaged.get(step) or _problem(folder, quick=True)
        return found

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            # Orbax reads every step when it begins, counts it as kept, and replaces one of the same name.
            if jax.process_index() == 0:
                for step, problem in self._survey().items():
                    if problem is not None:
                        self._set_aside(step, problem)
                self._empty_deleted()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("llama_jax: damaged checkpoints set aside")
            self._damaged.clear()
            try:
                self._manager = make_manager(self.folder, dataclasses.asdict(self.config))
            except OSError as error:
                raise CheckpointError(f"{self.folder}: cannot be written: {one_line(error)}") from error
        return self._manager

    def _remove_what_was_begun(self) -> None:
        # Orbax's other writers may not have noticed yet, and make files while these go.
        for _ in range(_TRIES):
            begun = list(self.folder.glob(f"*{TEMPORARY}*"))
            if not begun:
                return
            for path in begun:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.1)

    def _set_aside(self, step: int, problem: str) -> None:
        """Renames a damaged step, so that a good one can take its name; nothing of it is deleted."""
        target = self.folder / f"{step}{DAMAGED}"
        count = 1
        while target.exists():
            count += 1
            target = self.folder / f"{step}{DAMAGED}-{count}"
        (self.folder / str(step)).rename(target)
        if step not in self._damaged:
            self.warn(f"checkpoint of step {step} is not used: {problem}")
        self.warn(
            f"the damaged checkpoint of step {step} is now {target}; remove it when you are done with it"
        )

    def _empty_deleted(self) -> None:
        # Orbax renames what is no longer kept, so that a kill in between leaves no half of a step behind.
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def _failed(self, error: Exception) -> CheckpointError:
        """Cleans up after a save that failed, and says what went wrong."""
        step, self._writing, self._manager, self._unsilence = self._writing, None, None, None
        if jax.process_index() == 0:
            self._remove_what_was_begun()
        kept = self.steps()
        safe = (
            f"the earlier checkpoints are whole, the newest is of step {kept[-1]}"
            if kept
            else "none was saved"
        )
        return CheckpointError(
            f"checkpoint of step {step} could not be written to {self.folder}: {one_line(error)}; {safe}; "
            "make room or choose another train.run_dir, and run the same command again to resume"
        )


def _problem(folder: Path, *, quick: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    try:
        manifest.verify(folder, quick=quick, share=share)
        read_record(folder)
    except CheckpointError as error:
        return str(error)
    return None


def _first(problem: str | None) -> str | None:
    """Returns what the first process that has something to say says."""
    if jax.process_count() == 1:
        return problem
    line = np.zeros(400, np.uint8)
    text = (problem or "").encode()[: line.size]
    line[: len(text)] = np.frombuffer(text, np.uint8)
    for row in multihost_utils.process_allgather(line):
        if said := row.tobytes().rstrip(b"\0").decode(errors="replace"):
            return said
    return None
