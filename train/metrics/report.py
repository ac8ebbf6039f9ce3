"""Metric writers: JSONL files, a progress bar or log lines on stderr, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config.log import LogConfig

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
WANDB_ID_FILE = "wandb_id"
# The metrics of an evaluation's log line, in this order, and their formats.
_EVALUATION_FORMATS = {
    "eval_loss": ".4f",
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
    ) -> None:
        self._is_primary = is_primary
        self._console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns, console=self._console, disable=not (is_primary and self._console.is_terminal)
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, metrics="")
        self._total_steps = total_steps
        self._run_dir = run_dir
        self._files: dict[str, Any] = {}
        self._tensorboard: Any = None
        self._wandb: Any = None
        if not is_primary:
            return
        for name in (METRICS, EVALUATIONS):
            _truncate_after(run_dir / name, start_step)
            self._files[name] = (run_dir / name).open("a", buffering=1, encoding="utf-8")
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        if config.wandb:
            self._wandb = _init_wandb(config.wandb, run_dir, settings)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        for file in self._files.values():
            file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def step(self, record: Mapping[str, Any]) -> None:
        """Writes the metrics of the steps since the last record."""
        line = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        if record["mfu"] is not None:
            line += f"  MFU {record['mfu']:.1%}"
        self._bar.update(self._task, completed=record["step"], metrics=line)
        if self._is_primary and not self._console.is_terminal:
            self.log(f"step {record['step']}/{self._total_steps}  {line}")
        self._write(METRICS, record)
        self._track("train", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Writes the metrics of an evaluation, a sampled text, or both."""
        if "eval_loss" in record:
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

    def log(self, text: str) -> None:
        """Prints a line on stderr, above the progress bar."""
        if self._is_primary:
            self._console.print(text, markup=False, soft_wrap=True)

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        if self._is_primary:
            self._files[name].write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def _track(self, group: str, record: Mapping[str, Any]) -> None:
        """Sends a record's numbers to TensorBoard and W&B; `eval_loss` is `eval/loss`, as in HF's Trainer."""
        metrics = {
            f"{group}/{name.removeprefix('eval_')}": value
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))
        }
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, record["step"])
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
    if path.exists():
        kept = [record for record in read_records(path) if record["step"] <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        temporary.replace(path)


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
