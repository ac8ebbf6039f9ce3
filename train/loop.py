"""The loop: batch, step, record, evaluate, save; until the steps are done or something stops it."""

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

from llama_jax.errors import LlamaJaxError

from .checkpoints.checkpoints import Checkpoints
from .config.finetune import HEADS
from .config.run import EvalConfig, RunConfig
from .data import Batches
from .feed import Feed, arrays_of
from .metrics.report import Report
from .signals import Interrupts
from .state import TrainState
from .step import StepMetrics

MEASURED = "eval_losses"  # in a checkpoint, beside the data's own state


class Diverged(LlamaJaxError):
    """The loss or its gradient was not finite for too many steps in a row."""


def out_of_patience(losses: Sequence[float], config: EvalConfig) -> bool:
    """Whether the last `config.patience` losses are none of them lower than the lowest before."""
    if not config.patience or len(losses) <= config.patience:
        return False
    before, since = losses[: -config.patience], losses[-config.patience :]
    return min(since) > min(before) - max(config.min_improvement, 1e-12)


@dataclasses.dataclass
class Clock:
    """Where the time since the last record went, in seconds."""

    start: float = dataclasses.field(default_factory=time.perf_counter)
    data: float = 0.0
    checkpoint: float = 0.0
    evaluation: float = 0.0

    @contextlib.contextmanager
    def count(self, what: str) -> Any:
        """Adds the time of the block to `data`, `checkpoint` or `evaluation`."""
        begin = time.perf_counter()
        yield
        setattr(self, what, getattr(self, what) + time.perf_counter() - begin)

    @property
    def training(self) -> float:
        """Seconds that went into steps and their data."""
        return time.perf_counter() - self.start - self.checkpoint - self.evaluation


@dataclasses.dataclass
class Loop:
    """Everything the loop needs, made by `launch.py`.

    Attributes:
      run: the configuration.
      run_dir: the run's directory.
      step: the compiled step.
      state: after `done` steps.
      done: how many.
      batches: of this process, at the same place.
      feed: from there to the devices.
      checkpoints, report, interrupts: as their modules say.
      held_out: parameters to the held-out numbers.
      sample: parameters and key to a text.
      diagnose: parameters and a batch to what is wrong with their gradient.
      flops: operations a token: `causal` and `full`.
      peak: FLOP/s of all devices.
      measured: the held-out losses of the run so far, for `eval.patience`.
    """

    run: RunConfig
    run_dir: Path
    step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
    state: TrainState
    done: int
    batches: Batches
    feed: Feed
    checkpoints: Checkpoints
    report: Report
    interrupts: Interrupts
    held_out: Callable[[Any], dict[str, float]]
    sample: Callable[[Any, jax.Array], str]
    diagnose: Callable[[Any, Any], dict[str, Any]]
    flops: Mapping[str, float]
    peak: float
    measured: list[float] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.perf_counter()
        self._clock = Clock()
        self._since: list[tuple[int, StepMetrics]] = []  # steps that no record has yet
        self._latest: tuple[int, StepMetrics] | None = None
        self._recent: dict[int, Mapping[str, np.ndarray]] = {}  # batches of the last two steps
        self._numbers: dict[str, float] = {}  # measured at this very step
        self._trace_until = 0

    def train(self) -> int:
        """Runs to the last step.

        Returns:
          0, or the signal that stopped it; everything so far is saved in either case.

        Raises:
          Diverged: after `max_bad_steps` steps in a row that were skipped as not finite; nothing of them is
            saved but a dump that shows why.
          CheckpointError, DataError: as they come.
        """
        stopped = 0
        while self.done < self.run.train.steps and not (stopped := self.interrupts.agreed_stop()):
            if out_of_patience(self.measured, self.run.eval):
                self.report.say(
                    f"the held-out loss has not fallen in {self.run.eval.patience} evaluations: stopped "
                    f"after step {self.done}; eval.patience 0 goes on"
                )
                break
            self._one()
        self._check(self._latest)
        if not stopped:
            self._evaluate(final=True)
        self._record()
        self._stop_trace()
        self._save()
        self.checkpoints.wait()
        return stopped

    def _one(self) -> None:
        """One step, and whatever is due after it."""
        self._profile()
        with self._clock.count("data"):
            batch = next(self.batches)
        self.state, metrics = self.step(self.state, self.feed.put(batch))
        self.done += 1
        self._since.append((self.done, metrics))
        self._recent = {k: v for k, v in self._recent.items() if k > self.done - 2} | {self.done: batch}
        self._check(self._latest)  # the step before: this one is still running
        self._latest = (self.done, metrics)
        if self.done % self.run.log.every == 0:
            self._record()
        if self.done == self.run.train.steps:
            return
        self._evaluate(final=False)
        if self.checkpoints.should_save(self.done):
            self._check(self._latest)  # waits for the step, which is not the checkpoint's time
            self._save()

    def _check(self, step: tuple[int, StepMetrics] | None) -> None:
        """Aborts if with this step too many in a row were bad."""
        if step is None or int(step[1].bad_run) < self.run.train.max_bad_steps:
            return
        number, metrics = step
        where = self._dump(number, metrics)
        self._record()
        raise Diverged(
            f"step {number}: loss {float(metrics.loss)}, gradient norm {float(metrics.grad_norm)}, bad "
            f"for {int(metrics.bad_run)} steps in a row, all of them skipped; {where} says where; lower "
            "optimizer.learning_rate, or look at the data of that step"
        )

    def _dump(self, number: int, metrics: StepMetrics) -> Path:
        folder = self.run_dir / "not_finite" / f"step_{number}"
        batch = self._recent.get(number)
        report: dict[str, Any] = {
            "step": number,
            "loss": str(metrics.loss),
            "grad_norm": str(metrics.grad_norm),
        }
        if batch is not None:
            report.update(self.diagnose(self.state.params, self.feed.put(batch)))
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.json").write_text(json.dumps(report, indent=1))
            if batch is not None:
                arrays: dict[str, Any] = {**arrays_of(batch)}
                np.savez(folder / "batch.npz", **arrays)
        return folder

    def _record(self) -> None:
        """Writes the line of the steps since the last one."""
        if not self._since:
            return
        metrics = [jax.device_get(m) for _, m in self._since]
        seconds, clock, steps = self._clock.training, self._clock, len(metrics)
        counted = sum(float(m.tokens) for m in metrics)
        read = self.run.train.global_batch_size * self.run.train.seq_len
        rate = steps * read / seconds
        losses = sum(float(m.loss) * float(m.tokens) for m in metrics)
        self.report.step(
            {
                "step": self._since[-1][0],
                "loss": losses / max(counted, 1.0),
                "tokens": self._since[-1][0] * read,
                "tokens_per_second": rate,
                "mfu": rate * self.flops["causal"] / self.peak,
                "mfu_full_attention": rate * self.flops["full"] / self.peak,
                "learning_rate": float(metrics[-1].learning_rate),
                "grad_norm": float(metrics[-1].grad_norm),
                "seconds": time.perf_counter() - self._began,
                "step_seconds": (seconds - clock.data) / steps,
                "data_seconds": clock.data / steps,
                "checkpoint_seconds": clock.checkpoint / steps,
                "evaluation_seconds": clock.evaluation / steps,
                "skipped_steps": int(metrics[-1].skipped),
                "skipped_records": sum(self.batches.skipped.values()),
            }
        )
        self._since, self._clock = [], Clock()

    def _evaluate(self, *, final: bool) -> None:
        every, sample = self.run.eval.every, self.run.eval.sample_every
        measure = final or (every and self.done % every == 0)
        write = self.run.eval.max_new_tokens and (final or (sample and self.done % sample == 0))
        write = write and self.run.train.objective not in HEADS  # which predict no tokens
        record: dict[str, Any] = {"step": self.done}
        self._numbers = {}
        if measure or write:  # the steps' own time ends before the evaluation's begins
            jax.block_until_ready(self.state.step)
        with self._clock.count("evaluation"):
            if measure:
                self._numbers = self.held_out(self.state.params)
                record |= self._numbers
                self.measured += [self._numbers["eval_loss"]] if self._numbers else []
            if write:
                key = jax.random.fold_in(self.state.key, self.done)
                record["text"] = self.sample(self.state.params, key)
        if len(record) > 1:
            self.report.evaluation(record)

    def _save(self) -> None:
        if self.done:
            with self._clock.count("checkpoint"):
                kept = {**self.batches.state(), MEASURED: self.measured}
                self.checkpoints.save(self.done, self.state, kept, self._numbers)

    def _profile(self) -> None:
        """Starts a trace when it is asked for, and ends it so many steps later."""
        wanted = self.run.train.profile_at and self.done + 1 == self.run.train.profile_at
        if (wanted or self.interrupts.profile) and not self._trace_until:
            self.interrupts.profile = False
            jax.profiler.start_trace(str(self.run_dir / "profile"))
            self._trace_until = self.done + self.run.train.profile_steps
        elif self._trace_until and self.done >= self._trace_until:
            self._stop_trace()

    def _stop_trace(self) -> None:
        if self._trace_until:
            jax.block_until_ready(self.state.step)
            jax.profiler.stop_trace()
            self._trace_until = 0
            self.report.say(f"profiler trace in {self.run_dir / 'profile'}; tensorboard --logdir shows it")
