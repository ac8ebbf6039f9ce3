"""The training loop: batch, step, log, evaluate, save; until the last step, a signal or early stopping."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from llama_jax.errors import DataError, ExitStatus, LlamaJaxError, StorageError, StoreError
from llama_jax.storage import local_folder

from .checkpoints.checkpoints import Checkpoints
from .config.eval import EvalConfig
from .config.objective import HEAD_OBJECTIVES
from .config.run import RunConfig
from .data import Batches
from .feed import Feed, only_arrays
from .metrics.clock import Clock, GoodputRecords
from .metrics.report import Report
from .rl.rewards import RewardError
from .rl.rollouts import Rollouts
from .signals import FAILED, REFUSED, Interrupts
from .state import TrainState
from .step import StepMetrics

EVAL_LOSSES = "eval_losses"  # key in a checkpoint's data state


class Diverged(LlamaJaxError):
    """Loss or gradient were not finite for `train.max_bad_steps` consecutive steps."""

    exit_status = ExitStatus.NOT_FINITE


def _may_pass(problem: Exception) -> bool:
    """Whether what a run was stopped for may be over when it is started again."""
    return not isinstance(problem, StoreError) or problem.transient


def should_stop_early(losses: Sequence[float], config: EvalConfig) -> bool:
    """Whether none of the last `config.patience` eval losses improved on the lowest before them."""
    if not config.patience or len(losses) <= config.patience:
        return False
    before, last = losses[: -config.patience], losses[-config.patience :]
    return min(last) > min(before) - max(config.min_improvement, 1e-12)


@dataclasses.dataclass
class Loop:
    """The training loop's state and functions, set up by `launch.py`.

    Attributes:
      run: the configuration.
      run_dir: the run's directory.
      step: the compiled step.
      state: the training state.
      steps_done: number of steps in `state`.
      batches: this process's batches from the next step on; rollouts are made with its weights.
      feed: transfers batches to the devices.
      checkpoints, report, interrupts, clock, goodput: see their classes.
      evaluate: trainable parameters -> metrics on the validation set.
      sample: (trainable parameters, key) -> sampled text.
      find_nonfinite: (trainable parameters, batch) -> which parameters and gradients are not finite.
      flops_per_token: FLOPs per token with `causal` and `full` attention.
      peak_flops: FLOP/s of all devices; None if it is unknown.
      eval_losses: the eval losses of the run so far, for `eval.patience`.
    """

    run: RunConfig
    run_dir: Path
    step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
    state: TrainState
    steps_done: int
    batches: Batches | Rollouts
    feed: Feed
    checkpoints: Checkpoints
    report: Report
    interrupts: Interrupts
    clock: Clock
    goodput: GoodputRecords
    evaluate: Callable[[Any], dict[str, float]]
    sample: Callable[[Any, jax.Array], str]
    find_nonfinite: Callable[[Any, Any], dict[str, Any]]
    flops_per_token: Mapping[str, float]
    peak_flops: float | None
    eval_losses: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._start, self._first_step = time.perf_counter(), self.steps_done + 1
        self._running: list[tuple[int, StepMetrics]] = []  # dispatched, and perhaps not finished
        self._unlogged: list[tuple[int, StepMetrics]] = []  # finished steps since the last record
        self._logged_seconds: dict[str, float] = {}  # of the clock, at the last record
        self._recent_batches: dict[int, Mapping[str, np.ndarray]] = {}  # of the last two steps
        self._eval_metrics: dict[str, float] = {}  # of this step, if it was evaluated
        self._trace_end = 0  # the step after which the profiler trace ends; 0 without one
        self._trace_files = contextlib.ExitStack()

    def train(self) -> int:
        """Runs the remaining steps.

        Returns:
          0, or the signal that stopped it; the state is saved in any case.

        Raises:
          Diverged: after `max_bad_steps` consecutive steps whose loss or gradient was not finite; the last of
            them is not saved, but dumped for debugging.
          CheckpointError, DataError: from saving checkpoints and reading data.
          StorageError, BrokenPipeError: if the metrics or the log cannot be written; the state is saved.
        """
        self.clock.switch("steps")
        self._logged_seconds = self.clock.seconds()
        try:
            stopped = self._run_steps()
        except DataError as error:
            self._save_before_raising(error)
            raise
        self._log_metrics()
        self._stop_trace()
        self._save()
        with self.clock.spend("checkpoint"):
            self.checkpoints.wait()
        self.goodput.finish(self.steps_done, complete=not stopped)
        self.clock.switch("evaluation")  # what is left may take as long
        self._raise_problem(stopped)
        return stopped

    def _raise_problem(self, stopped: int) -> None:
        """Raises what the run was saved and stopped for, in this process or another."""
        if isinstance(problem := self.report.problem, BrokenPipeError):
            raise problem
        if problem is not None or stopped in (FAILED, REFUSED):
            fix = "" if isinstance(problem, StoreError) else "free some space, and "
            raise StorageError(
                f"{problem or 'process 0 cannot write the metrics'}; the run is saved after step "
                f"{self.steps_done}: {fix}run the same command again to resume",
                transient=_may_pass(problem) if problem is not None else stopped == FAILED,
            )

    def _agreed_stop(self) -> int:
        if (problem := self.report.problem) is not None:
            self.interrupts.fail(transient=_may_pass(problem))
        if jax.process_count() > 1 and jax.process_index() == 0 and self.checkpoints.is_time():
            self.interrupts.ask_to_save()
        return self.interrupts.agreed_stop()

    def _run_steps(self) -> int:
        """Runs the remaining steps and the final evaluation; returns 0, or the signal that stopped it."""
        stopped = 0
        while self.steps_done < self.run.train.steps and not (stopped := self._agreed_stop()):
            if should_stop_early(self.eval_losses, self.run.eval):
                self.report.log(
                    f"eval_loss has not improved in {self.run.eval.patience} evaluations: stopped after step "
                    f"{self.steps_done}; set eval.patience to 0 to continue"
                )
                break
            self._run_step()
        self._finish_running()
        if not stopped:
            self._evaluate(final=True)
        return stopped

    def _save_before_raising(self, error: DataError) -> None:
        """Saves the steps that were done before a record could not be used.

        A single process does: of several, the others do not know of the error, and a save waits for all.
        """
        if jax.process_count() > 1 or not self.steps_done:
            return
        self._eval_metrics = {}
        self._save()
        self.checkpoints.wait()
        how = " with --data.bad_records skip goes on from there (files that are changed need a new run)"
        self.report.log(
            f"saved after step {self.steps_done}; the same command"
            f"{' goes on from there' if isinstance(error, RewardError) else how}"
        )

    def _run_step(self) -> None:
        """Dispatches a step, and runs the logging, evaluation and checkpoint that are due.

        The metrics of a step are read when the next one has been dispatched, so that the devices have work
        while the host prepares the batch after it.
        """
        self._profile()
        batch = self._next_batch()
        begin = time.perf_counter()
        self.state, metrics = self.step(self.state, self.feed.put(batch))
        for value in jax.tree.leaves(metrics):
            value.copy_to_host_async()
        self.steps_done += 1
        self._running.append((self.steps_done, metrics))
        self._recent_batches[self.steps_done] = batch
        self._recent_batches.pop(self.steps_done - 2, None)
        if isinstance(self.batches, Rollouts):  # which need its weights
            jax.block_until_ready(metrics)
            self.batches.updated(time.perf_counter() - begin, metrics)
            self._finish_running()
        self._finish_running(but=1)
        self.report.advance(self.steps_done)
        if self.steps_done == self.run.train.steps:
            return
        self._evaluate(final=False)
        if self.checkpoints.should_save(self.steps_done, is_time=self.interrupts.save_is_due):
            self._finish_running()  # their time is not the checkpoint's
            if not int(metrics.bad_run):  # else the weights may be ruined, and would push out good ones
                self._save()

    def _next_batch(self) -> Mapping[str, np.ndarray]:
        """This process's next batch; the wait is the data's where the devices have become idle."""
        if isinstance(self.batches, Rollouts):
            return self.batches.next(self.state, self.steps_done)
        start, self.clock.waiting_for = time.monotonic(), "waiting for a batch"
        batch = next(self.batches)
        self.clock.waiting_for = ""
        if all(value.is_ready() for _, metrics in self._running[-1:] for value in jax.tree.leaves(metrics)):
            self.clock.reassign(time.monotonic() - start, source="steps", target="data")
        return batch

    def _finish_running(self, but: int = 0) -> None:
        """Waits for all dispatched steps but the last few, and logs their metrics.

        Raises:
          Diverged: if one was the last of `max_bad_steps` consecutive skipped steps.
        """
        while len(self._running) > but:
            number, on_devices = self._running.pop(0)
            metrics = jax.device_get(on_devices)
            self.clock.progress()
            self._unlogged.append((number, metrics))
            if int(metrics.bad_run) >= self.run.train.max_bad_steps:
                self._diverged(number, metrics)
            if number == self._first_step:
                self.report.first_step(number, float(metrics.loss))
            if number % self.run.log.every == 0:
                self._log_metrics()

    def _diverged(self, number: int, metrics: StepMetrics) -> NoReturn:
        """Dumps a step that was not finite, and aborts."""
        try:
            with self.clock.spend("evaluation"):
                details = f"{self._dump(number, metrics)} lists the tensors"
        except OSError as error:
            details = f"{error.filename or self.run_dir} cannot be written: {error.strerror}"
        self._log_metrics()
        raise Diverged(
            f"step {number}: loss {float(metrics.loss)}, gradient norm {float(metrics.grad_norm)}; not "
            f"finite for {int(metrics.bad_run)} consecutive steps, which were skipped; {details}; "
            "lower optimizer.learning_rate, or check the data of that step"
        )

    def _dump(self, number: int, metrics: StepMetrics) -> Path:
        """Writes a step's batch, and which parameters and gradients are not finite; returns the directory."""
        folder = self.run_dir / "not_finite" / f"step_{number}"
        batch = self._recent_batches.get(number)
        report: dict[str, Any] = {
            "step": number,
            "loss": str(metrics.loss),
            "grad_norm": str(metrics.grad_norm),
        }
        if batch is not None:
            report.update(self.find_nonfinite(self.state.params, self.feed.put(batch)))
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.json").write_text(json.dumps(report, indent=1))
            if batch is not None:
                arrays: dict[str, Any] = {**only_arrays(batch)}
                with (folder / "batch.npz").open("wb") as file:
                    np.savez(file, **arrays)
        return folder

    def _log_metrics(self) -> None:
        """Writes the record of the finished steps since the last one."""
        if not self._unlogged:
            return
        last, metrics = self._unlogged[-1][0], [values for _, values in self._unlogged]
        now, steps = self.clock.seconds(), len(metrics)
        seconds = {name: value - self._logged_seconds[name] for name, value in now.items()}
        count = sum(float(m.tokens) for m in metrics)
        tokens_per_step = self.run.train.global_batch_size * self.run.train.seq_len
        rate = steps * tokens_per_step / max(seconds["steps"] + seconds["data"], 1e-9)
        total_loss = sum(float(m.loss) * float(m.tokens) for m in metrics)
        self.goodput.write(last)
        goodput = self.goodput.goodput()
        shares = {} if goodput is None else goodput.shares
        losses = metrics[-1].router
        router = {} if losses is None else {"router_aux_loss": losses.balance, "router_z_loss": losses.z}
        self.report.step(
            {
                "step": last,
                "loss": total_loss / max(count, 1.0),
                "tokens": last * tokens_per_step,
                "tokens_per_second": rate,
                "mfu": self._utilization(rate, "causal"),
                "mfu_full_attention": self._utilization(rate, "full"),
                "learning_rate": float(metrics[-1].learning_rate),
                "grad_norm": float(metrics[-1].grad_norm),
                **{name: float(value) for name, value in router.items()},
                **(self.batches.metrics() if isinstance(self.batches, Rollouts) else {}),
                "seconds": time.perf_counter() - self._start,
                "step_seconds": seconds["steps"] / steps,
                "data_seconds": seconds["data"] / steps,
                "checkpoint_seconds": seconds["checkpoint"] / steps,
                "evaluation_seconds": seconds["evaluation"] / steps,
                "skipped_steps": int(metrics[-1].skipped),
                "skipped_records": sum(self.batches.skipped.values()),
                "goodput": shares.get("steps"),
                "wall_time": {name: round(share, 4) for name, share in shares.items()},
            }
        )
        self._unlogged, self._logged_seconds = [], now

    def _utilization(self, tokens_per_second: float, attention: str) -> float | None:
        """The fraction of the devices' peak FLOP/s; None where that is unknown."""
        if self.peak_flops is None:
            return None
        return tokens_per_second * self.flops_per_token[attention] / self.peak_flops

    def _evaluate(self, *, final: bool) -> None:
        """Evaluates, and samples text, if this step is due for it."""
        config, objective = self.run.eval, self.run.train.objective
        evaluate = final or (config.every and self.steps_done % config.every == 0)
        sample = final or (config.sample_every and self.steps_done % config.sample_every == 0)
        sample = sample and config.max_new_tokens and objective not in HEAD_OBJECTIVES  # they have no LM head
        record: dict[str, Any] = {"step": self.steps_done}
        self._eval_metrics = {}
        if evaluate or sample:
            self._finish_running()  # their time is not the evaluation's
        with self.clock.spend("evaluation"):
            if evaluate:
                self._eval_metrics = self.evaluate(self.state.params)
                record |= self._eval_metrics
                self.eval_losses += [x for name, x in self._eval_metrics.items() if name == "eval_loss"]
            if sample:
                key = jax.random.fold_in(self.state.key, self.steps_done)
                record["text"] = self.sample(self.state.params, key)
        if len(record) > 1:
            self.report.evaluation(record)

    def _save(self) -> None:
        if self.steps_done:
            with self.clock.spend("checkpoint"):
                self.report.flush()
                data_state = {**self.batches.state(), EVAL_LOSSES: self.eval_losses}
                self.checkpoints.save(self.steps_done, self.state, data_state, self._eval_metrics)

    def _profile(self) -> None:
        """Starts a profiler trace at `profile_at` or on SIGUSR1, and ends it after `profile_steps` steps."""
        is_due = self.run.train.profile_at and self.steps_done + 1 == self.run.train.profile_at
        if (is_due or self.interrupts.profile) and not self._trace_end:
            self.interrupts.profile = False
            folder = self._trace_files.enter_context(local_folder(self.run_dir / "profile"))
            jax.profiler.start_trace(str(folder))
            self._trace_end = self.steps_done + self.run.train.profile_steps
        elif self._trace_end and self.steps_done >= self._trace_end:
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self._trace_end:
            jax.block_until_ready(self.state.step)
            with self.clock.spend("evaluation"):
                jax.profiler.stop_trace()
                self._trace_files.close()
            self._trace_end = 0
            self.report.log(
                f"profiler trace in {self.run_dir / 'profile'}; view it with tensorboard --logdir"
            )
