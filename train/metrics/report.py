"""Where a run's numbers go: metrics.jsonl always, a bar or lines on the terminal, TensorBoard, W&B."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config.run import LogConfig

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
WANDB_ID = "wandb_id"


# What an evaluation's line shows, in this order, and how.
_SHOWN = {
    "eval_loss": ".4f",
    "perplexity": ".2f",
    "bits_per_byte": ".3f",
    "accuracy": ".1%",
    "macro_f1": ".3f",
    "reward_margin": ".3f",
    "mean_absolute_error": ".4f",
}


class Report:
    """A run's outlets. Only the first process of a run has any; in the others every method does nothing.

    Args:
      run_dir: the run's directory.
      config: which outlets.
      steps: of the whole run, for the bar.
      done: steps taken before: later records, of steps that will be taken again, are dropped.
      first: whether this is the run's first process.
      settings: the run's configuration, for W&B.
    """

    def __init__(
        self,
        run_dir: Path,
        config: LogConfig,
        *,
        steps: int,
        done: int,
        first: bool,
        settings: Mapping[str, Any],
    ) -> None:
        self._first = first
        self._console = Console(stderr=True, highlight=False)
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(
            *columns, console=self._console, disable=not (first and self._console.is_terminal)
        )
        self._task = self._bar.add_task("", total=steps, completed=done, said="")
        self._steps = steps
        self._run_dir = run_dir
        self._files: dict[str, Any] = {}
        self._board: Any = None
        self._wandb: Any = None
        if not first:
            return
        for name in (METRICS, EVALUATIONS):
            _drop_after(run_dir / name, done)
            self._files[name] = (run_dir / name).open("a", buffering=1, encoding="utf-8")
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1)
        if config.wandb:
            self._wandb = _wandb(config.wandb, run_dir, settings)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def step(self, record: Mapping[str, Any]) -> None:
        """Records the steps since the last record."""
        said = f"loss {record['loss']:.4f}  {record['tokens_per_second']:,.0f} tokens/s"
        if record["mfu"] is not None:
            said += f"  MFU {record['mfu']:.1%}"
        self._bar.update(self._task, completed=record["step"], said=said)
        if self._first and not self._console.is_terminal:
            self.say(f"step {record['step']}/{self._steps}  {said}")
        self._write(METRICS, record)
        self._numbers("train", record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Records an evaluation, a sampled text, or both."""
        if "eval_loss" in record:
            others = [
                f"{name.replace('_', ' ').replace('held out', 'held-out')} {record[name]:{form}}"
                for name, form in _SHOWN.items()
                if name in record
            ]
            self.say(f"step {record['step']}  {'  '.join(others)}")
        if "text" in record:
            self.say(f"step {record['step']}  sample: {record['text']!r}")
        self._write(EVALUATIONS, record)
        self._numbers("held_out", record)

    def say(self, text: str) -> None:
        """Prints a line on stderr, above the bar."""
        if self._first:
            self._console.print(text, markup=False, soft_wrap=True)

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Hides the bar while something else is shown."""
        return self._paused()

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        self._bar.stop()
        yield
        self._bar.start()

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        if self._first:
            self._files[name].write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def _numbers(self, group: str, record: Mapping[str, Any]) -> None:
        numbers = {
            f"{group}/{name}": value
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))
        }
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file that are whole: a kill may have cut the last one."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [record for record in read_records(path) if record["step"] <= step]
        whole = path.with_suffix(".tmp")
        whole.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        whole.replace(path)


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such a number is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}


def _wandb(project: str, run_dir: Path, settings: Mapping[str, Any]) -> Any:
    import wandb

    known = run_dir / WANDB_ID  # a resumed run goes on in the same chart
    name = known.read_text().strip() if known.exists() else secrets.token_hex(4)
    known.write_text(name)
    return wandb.init(
        project=project, name=run_dir.name, id=name, resume="allow", dir=str(run_dir), config=dict(settings)
    )
