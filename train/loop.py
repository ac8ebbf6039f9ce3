"""The training loop: batch, step, log, evaluate, save; until the last step, a signal or early stopping."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax.errors import DataError, LlamaJaxError

from .checkpoints.checkpoints import Checkpoints
from .config.eval import EvalConfig
from .config.objective import HEAD_OBJECTIVES
from .config.run import RunConfig
from .data import Batches
from .feed import Feed, only_arrays
from .metrics.report import Report
from .signals import Interrupts
from .state import TrainState
from .step import StepMetrics

EVAL_LOSSES = "eval_losses"  # key in a checkpoint's data state


class Diverged(LlamaJaxError):
    """Loss or gradient were not finite for `train.max_bad_steps` consecutive steps."""


def should_stop_early(losses: Sequence[float], config: EvalConfig) -> bool:
    """Whether none of the last `config.patience` eval losses improved on the lowest before them."""
    if not config.patience or len(losses) <= config.patience:
        return False
    before, last = losses[: -config.patience], losses[-config.patience :]
    return min(last) > min(before) - max(config.min_improvement, 1e-12)


@dataclasses.dataclass
class Timer:
    """Seconds since the last record, by what they were spent on."""

    start: float = dataclasses.field(default_factory=time.perf_counter)
    data: float = 0.0
    checkpoint: float = 0.0
    evaluation: float = 0.0

    @contextlib.contextmanager
    def measure(self, name: str) -> Any:
        """Adds the time of the block to `data`, `checkpoint` or `evaluation`."""
        start = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    @property
    def training(self) -> float:
        """Seconds spent on steps and their data."""
        return time.perf_counter() - self.start - self.checkpoint - self.evaluation


@dataclasses.dataclass
class Loop:
    """The training loop's state and functions, set up by `launch.py`.

    Attributes:
      run: the configuration.
      run_dir: the run's directory.
      step: the compiled step.
      state: the training state.
      steps_done: number of steps in `state`.
      batches: this process's batches from the next step on.
      feed: transfers batches to the devices.
      checkpoints, report, interrupts: see their classes.
      evaluate: trainable parameters -> metrics on the validation set.
      sample: (trainable parameters, key) -> sampled text.
      find_nonfinite: (trainable parameters, batch) -> which parameters and gradients are not finite.
      flops_per_token: FLOPs per token with `causal` and `full` attention.
      peak_flops: FLOP/s of all devices.
      eval_losses: the eval losses of the run so far, for `eval.patience`.
    """

    run: RunConfig
    run_dir: Path
    step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
    state: TrainState
    steps_done: int
    batches: Batches
    feed: Feed
    checkpoints: Checkpoints
    report: Report
    interrupts: Interrupts
    evaluate: Callable[[Any], dict[str, float]]
    sample: Callable[[Any, jax.Array], str]
    find_nonfinite: Callable[[Any, Any], dict[str, Any]]
    flops_per_token: Mapping[str, float]
    peak_flops: float
    eval_losses: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._start = time.perf_counter()
        self._timer = Timer()
        self._unlogged: list[tuple[int, StepMetrics]] = []  # steps since the last record
        self._latest: tuple[int, StepMetrics] | None = None
        self._recent_batches: dict[int, Mapping[str, np.ndarray]] = {}  # of the last two steps
        self._eval_metrics: dict[str, float] = {}  # of this step, if it was evaluated
        self._trace_end = 0  # the step after which the profiler trace ends; 0 without one

    def train(self) -> int:
        """Runs the remaining steps.

        Returns:
          0, or the signal that stopped it; the state is saved in either case.

        Raises:
          Diverged: after `max_bad_steps` consecutive steps whose loss or gradient was not finite; the last of
            them is not saved, but dumped for debugging.
          CheckpointError, DataError: from saving checkpoints and reading data.
        """
        try:
            stopped = self._run_steps()
        except DataError as error:
            self._save_before_raising(error)
            raise
        self._log_metrics()
        self._stop_trace()
        self._save()
        self.checkpoints.wait()
        return stopped

    def _run_steps(self) -> int:
        """Runs the remaining steps and the final evaluation; returns 0, or the signal that stopped it."""
        stopped = 0
        while self.steps_done < self.run.train.steps and not (stopped := self.interrupts.agreed_stop()):
            if should_stop_early(self.eval_losses, self.run.eval):
                self.report.log(
                    f"eval_loss has not improved in {self.run.eval.patience} evaluations: stopped after step "
                    f"{self.steps_done}; set eval.patience to 0 to continue"
                )
                break
            self._run_step()
        self._check_finite(self._latest)
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
        self.report.log(
            f"saved after step {self.steps_done}; the same command with --data.bad_records skip goes on from "
            "there (files that are changed need a new run)"
        )

    def _run_step(self) -> None:
        """Runs a step, and the logging, evaluation and checkpoint that are due after it."""
        self._profile()
        with self._timer.measure("data"):
            batch = next(self.batches)
        self.state, metrics = self.step(self.state, self.feed.put(batch))
        self.steps_done += 1
        self._unlogged.append((self.steps_done, metrics))
        self._recent_batches[self.steps_done] = batch
        self._recent_batches.pop(self.steps_done - 2, None)
        self._check_finite(self._latest)  # of the previous step, so that this one runs asynchronously
        self._latest = (self.steps_done, metrics)
        if self.steps_done % self.run.log.every == 0:
            self._log_metrics()
        if self.steps_done == self.run.train.steps:
            return
        self._evaluate(final=False)
        if self.checkpoints.should_save(self.steps_done):
            self._check_finite(self._latest)  # waits for the step, whose time is not the checkpoint's
            if not int(metrics.bad_run):  # else the weights may be ruined, and would push out good ones
                self._save()

    def _check_finite(self, step: tuple[int, StepMetrics] | None) -> None:
        """Aborts if this was the last of `max_bad_steps` consecutive skipped steps."""
        if step is None or int(step[1].bad_run) < self.run.train.max_bad_steps:
            return
        number, metrics = step
        dump = self._dump(number, metrics)
        self._log_metrics()
        raise Diverged(
            f"step {number}: loss {float(metrics.loss)}, gradient norm {float(metrics.grad_norm)}; not "
            f"finite for {int(metrics.bad_run)} consecutive steps, which were skipped; {dump} lists the "
            "tensors; lower optimizer.learning_rate, or check the data of that step"
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
                np.savez(folder / "batch.npz", **arrays)
        return folder

    def _log_metrics(self) -> None:
        """Writes the record of the steps since the last one."""
        if not self._unlogged:
            return
        metrics = [jax.device_get(m) for _, m in self._unlogged]
        seconds, timer, steps = self._timer.training, self._timer, len(metrics)
        count = sum(float(m.tokens) for m in metrics)
        tokens_per_step = self.run.train.global_batch_size * self.run.train.seq_len
        rate = steps * tokens_per_step / seconds
        total_loss = sum(float(m.loss) * float(m.tokens) for m in metrics)
        self.report.step(
            {
                "step": self._unlogged[-1][0],
                "loss": total_loss / max(count, 1.0),
                "tokens": self._unlogged[-1][0] * tokens_per_step,
                "tokens_per_second": rate,
                "mfu": rate * self.flops_per_token["causal"] / self.peak_flops,
                "mfu_full_attention": rate * self.flops_per_token["full"] / self.peak_flops,
                "learning_rate": float(metrics[-1].learning_rate),
                "grad_norm": float(metrics[-1].grad_norm),
                "seconds": time.perf_counter() - self._start,
                "step_seconds": (seconds - timer.data) / steps,
                "data_seconds": timer.data / steps,
                "checkpoint_seconds": timer.checkpoint / steps,
                "evaluation_seconds": timer.evaluation / steps,
                "skipped_steps": int(metrics[-1].skipped),
                "skipped_records": sum(self.batches.skipped.values()),
            }
        )
        self._unlogged, self._timer = [], Timer()

    def _evaluate(self, *, final: bool) -> None:
        """Evaluates, and samples text, if this step is due for it."""
        config, objective = self.run.eval, self.run.train.objective
        evaluate = final or (config.every and self.steps_done % config.every == 0)
        sample = final or (config.sample_every and self.steps_done % config.sample_every == 0)
        sample = sample and config.max_new_tokens and objective not in HEAD_OBJECTIVES  # they have no LM head
        record: dict[str, Any] = {"step": self.steps_done}
        self._eval_metrics = {}
        if evaluate or sample:  # pending steps are not evaluation time
            jax.block_until_ready(self.state.step)
        with self._timer.measure("evaluation"):
            if evaluate:
                self._eval_metrics = self.evaluate(self.state.params)
                record |= self._eval_metrics
                self.eval_losses += [self._eval_metrics["eval_loss"]] if self._eval_metrics else []
            if sample:
                key = jax.random.fold_in(self.state.key, self.steps_done)
                record["text"] = self.sample(self.state.params, key)
        if len(record) > 1:
            self.report.evaluation(record)

    def _save(self) -> None:
        if self.steps_done:
            with self._timer.measure("checkpoint"):
                data_state = {**self.batches.state(), EVAL_LOSSES: self.eval_losses}
                self.checkpoints.save(self.steps_done, self.state, data_state, self._eval_metrics)

    def _profile(self) -> None:
        """Starts a profiler trace at `profile_at` or on SIGUSR1, and ends it after `profile_steps` steps."""
        is_due = self.run.train.profile_at and self.steps_done + 1 == self.run.train.profile_at
        if (is_due or self.interrupts.profile) and not self._trace_end:
            self.interrupts.profile = False
            jax.profiler.start_trace(str(self.run_dir / "profile"))
            self._trace_end = self.steps_done + self.run.train.profile_steps
        elif self._trace_end and self.steps_done >= self._trace_end:
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self._trace_end:
            jax.block_until_ready(self.state.step)
            jax.profiler.stop_trace()
            self._trace_end = 0
            self.report.log(
                f"profiler trace in {self.run_dir / 'profile'}; view it with tensorboard --logdir"
            )
