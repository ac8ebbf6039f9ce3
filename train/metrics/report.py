"""Metric writers: JSONL files, a progress bar or log lines on stderr, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llama_jax.console import terminal
from llama_jax.errors import InputError, StoreError
from llama_jax.storage.atomic import write_atomically

from ..config.log import LogConfig
from .append_file import AppendFile

METRICS, EVALUATIONS, SAMPLES = "metrics.jsonl", "evaluations.jsonl", "samples.jsonl"
_SHOWN = 8  # samples of a rollout that trackers get
WANDB_ID_FILE = "wandb_id"
_SPEED_SECONDS = 600.0  # of which the bar's time to go is estimated: many steps, even of a minute each
# The metrics of an evaluation's log line, in this order, and their formats.
_EVALUATION_FORMATS = {
    "eval_loss": ".4f",
    "eval_reward": ".4f",
    "eval_perplexity": ".2f",
    "bits_per_byte": ".3f",
    "accuracy": ".1%",
    "macro_f1": ".3f",
    "reward_margin": ".3f",
    "mean_absolute_error": ".4f",
}


class Report:
    """Writes a run's metrics; in all processes but the primary one every method does nothing.

    Args:
      run_dir: the run's directory.
      config: which writers are enabled.
      total_steps: of the whole run, for the progress bar.
      start_step: the step that the run resumes after; records of later steps, which run again, are removed.
      is_primary: whether this is process 0.
      settings: the run's configuration, for W&B.
      has_samples: whether the run samples completions.

    Attributes:
      problem: what went wrong first in writing the metrics or the log, if anything: the run is to be saved
        and stopped with it. What cannot be written after that is lost.

    Raises:
      InputError, StoreError: if the files cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        *,
        total_steps: int,
        start_step: int,
        is_primary: bool,
        settings: Mapping[str, Any],
        has_samples: bool = False,
    ) -> None:
        self._is_primary = is_primary
        self.problem: InputError | StoreError | BrokenPipeError | None = None
        self._console = terminal.console(stderr=True)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns,
            console=self._console,
            disable=not (is_primary and self._console.is_terminal),
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, metrics="")
        self._total_steps, self._log_every = total_steps, config.every
        self._run_dir = run_dir
        self._files: dict[str, AppendFile] = {}
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not is_primary:
            return
        for name in (METRICS, EVALUATIONS, *((SAMPLES,) if has_samples else ())):
            _truncate_after(run_dir / name, start_step)
            self._files[name] = AppendFile(run_dir / name)
            self._files[name].append(b"")
        if config.tensorboard:
            from .tensorboard import EventWriter

            self._tensorboard = EventWriter(run_dir / "tensorboard", start_step + 1, self.log)
        if config.wandb:
            self._wandb = _init_wandb(config.wandb, run_dir, settings)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._bar.stop()
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def flush(self) -> None:
        """Writes what has been logged to where it is read after a kill: before a checkpoint is saved."""
        for file in self._files.values():
            try:
                file.flush()
            except StoreError as error:
                self.problem = self.problem or error

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        self._bar.update(self._task, completed=step)

    def first_step(self, step: int, loss: float) -> None:
        """Logs the first loss where no bar shows progress, as the first record may be far."""
        if self._log_every > 1 and not self._console.is_terminal:
            self.log(f"step {step}/{self._total_steps}  loss {loss:.4f}")

    def step(self, record: Mapping[str, Any]) -> None:
        """Writes the metrics of the steps since the last record."""
        line = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        if "reward" in record:
            line = f"reward {record['reward']:.4f}  {line}"
        if record["mfu"] is not None:
            line += f"  MFU {record['mfu']:.1%}"
        self._bar.update(self._task, completed=record["step"], metrics=line)
        if self._is_primary and not self._console.is_terminal:
            self.log(f"step {record['step']}/{self._total_steps}  {line}")
        self._write(METRICS, record)
        self._track("train", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes the metrics of an evaluation, a sampled text, or both."""
        if "eval_loss" in record or "eval_reward" in record:
            metrics = [
                f"{name} {record[name]:{spec}}"
                for name, spec in _EVALUATION_FORMATS.items()
                if name in record
            ]
            self.log(f"step {record['step']}  {'  '.join(metrics)}")
        if "text" in record:
            self.log(f"step {record['step']}  sample: {record['text']!r}")
        self._write(EVALUATIONS, record)
        self._track("eval", record)

    def samples(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes the completions of a rollout; trackers get the first ones, as a text or a table."""
        for record in records:
            self._write(SAMPLES, record)
        step, shown = records[0]["step"], records[:_SHOWN]
        names = [name for name in ("prompt", "completion", "reward", "advantage") if name in records[0]]
        if self._tensorboard is not None:
            rows = [" | ".join(map(_cell, [record[name] for name in names])) for record in shown]
            head = [" | ".join(names), " | ".join("---" for _ in names)]
            self._tensorboard.add_text("samples", "\n".join([*head, *rows]), step)
        if self._wandb is not None:
            import wandb

            data = [[_plain(record[name]) for name in names] for record in shown]
            self._wandb.log({"samples": wandb.Table(columns=names, data=data)}, step=step)

    def log(self, text: str) -> None:
        """Prints a line on stderr, above the progress bar."""
        if self._is_primary:
            try:
                self._console.print(terminal.printable(text), markup=False, soft_wrap=True)
            except BrokenPipeError as error:  # as in `train 2>&1 | head`
                self.problem = self.problem or error
            except OSError:  # the terminal is gone: SIGHUP stops the run, if anything
                pass

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        if self._is_primary:
            try:
                self._files[name].append(json.dumps(_finite(record), allow_nan=False).encode() + b"\n")
            except (InputError, StoreError) as error:
                self.problem = self.problem or error

    def _track(self, group: str, record: Mapping[str, Any]) -> None:
        """Sends a record's numbers to TensorBoard and W&B; `eval_loss` is `eval/loss`, as in HF's Trainer."""
        metrics = {
            f"{group}/{name.removeprefix('eval_')}": value
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))
        }
        if self._tensorboard is not None:
            self._tensorboard.add_scalars(metrics, record["step"])
        if self._wandb is not None:
            self._wandb.log(metrics, step=record["step"])


def read_records(path: Path) -> list[dict[str, Any]]:
    """Reads the records of a JSONL file; the last line may be incomplete if the process was killed."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def _truncate_after(path: Path, step: int) -> None:
    """Removes the records after `step`."""
    if path.is_file():
        kept = [record for record in read_records(path) if record["step"] <= step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))


def _plain(value: Any) -> Any:
    """A value as a table of W&B has it: numbers stay numbers, messages become text."""
    return value if isinstance(value, (int, float, str)) else str(value)


def _cell(value: Any) -> str:
    """A cell of a Markdown table."""
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces NaN and infinity by None (null): JSON has neither."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _init_wandb(project: str, run_dir: Path, settings: Mapping[str, Any]) -> Any:
    import wandb

    id_file = run_dir / WANDB_ID_FILE  # a resumed run continues the same W&B run
    run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
    id_file.write_text(run_id)
    return wandb.init(
        project=project, name=run_dir.name, id=run_id, resume="allow", dir=str(run_dir), config=dict(settings)
    )
