"""What a training run's directory holds: its steps, what each says of itself, and why each is kept.

RUN/config.toml  metrics.jsonl  tokenizer.*
RUN/checkpoints/STEP/  checksums.json
                       params/     the parameters, an Orbax tree by themselves
                       state/      what else training needs, an Orbax tree
                       data/       process_N.json: where each process was in its data
                       metrics/    metrics: what best is judged by
                       run/        run.json: the model, and what the trainer says of the run
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.weights import manifest
from llama_jax.weights.safetensors import read_json
from llama_jax.weights.source import quote, reason

CHECKPOINTS = "checkpoints"
PARAMS, STATE, DATA, METRICS, RUN = "params", "state", "data", "metrics", "run"
RECORD = "run.json"
METRIC = "eval_loss"  # the metric that the best steps have least of
DAMAGED = ".damaged"  # what is put behind the name of a step that is set aside


@dataclasses.dataclass(frozen=True)
class Record:
    """What a step says of itself.

    Attributes:
      step: how many updates the parameters have had.
      config: the model.
      metrics: what was measured at this step, by name.
      keep: how many steps the run keeps, as `keep_policies` takes them.
      run: what else the trainer noted.
      time: when the step was saved.
    """

    step: int
    config: LlamaConfig
    metrics: Mapping[str, float]
    keep: Mapping[str, float]
    run: Mapping[str, Any]
    time: datetime.datetime


def is_run(path: Path) -> bool:
    """Whether a directory is a training run's, with or without checkpoints."""
    return (path / CHECKPOINTS).is_dir() or (path / "config.toml").is_file()


def step_folders(run: Path) -> dict[int, Path]:
    """Returns the folders of a run's saved steps, oldest first; nothing says yet that they are whole.

    Raises:
      CheckpointError: if the directory cannot be read.
    """
    folder = run / CHECKPOINTS
    try:
        names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.exists() else []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {reason(error)}; check its permissions") from None
    steps = sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 19)
    return {step: folder / str(step) for step in steps if (folder / str(step)).is_dir()}


def read_record(step: Path) -> Record:
    """Reads what the step in a folder says of itself.

    Raises:
      CheckpointError: if a file is missing, or not what the trainer writes.
    """
    path = step / RUN / RECORD
    fields = read_json(path)
    metrics = read_json(step / METRICS / METRICS) if (step / METRICS).exists() else {}
    parts = [fields.get(name) for name in ("model", "keep", "run")]
    seconds = fields.get("time")
    known = type(fields.get("step")) is int and all(isinstance(part, dict) for part in parts)
    if not known or type(seconds) is not float or not 0 <= seconds < 1e11:
        raise CheckpointError(f"{path}: not what the trainer writes: step, time, model, keep and run")
    model, keep, run = parts
    numbers = {name: value for name, value in metrics.items() if type(value) in (int, float)}
    time = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return Record(fields["step"], read_model(path, model), numbers, keep or {}, run or {}, time)


def read_model(path: Path, fields: Any) -> LlamaConfig:
    """Makes a configuration of its fields as `dataclasses.asdict` gives them.

    Raises:
      CheckpointError: for fields that it does not have, or values that cannot work.
    """
    try:
        fields = dict(fields)
        if fields.get("rope_scaling") is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        fields["labels"] = tuple(fields.get("labels", ()))
        return LlamaConfig(**fields)
    except (TypeError, ValueError, ConfigError) as error:
        what = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: does not describe a model: {quote(what)}") from None


def keep_policies(keep: Mapping[str, float]) -> dict[str, Any]:
    """Returns Orbax's preservation policies by the words that explain them.

    Args:
      keep: by the names of the trainer's settings: `keep` newest steps, `best` steps of the least held-out
        loss, every `keep_every`-th step, and one in `keep_hours` hours; 0 is none.
    """
    from orbax.checkpoint import checkpoint_managers as policies

    def loss(metrics: Any) -> float:
        value = (metrics or {}).get(METRIC, math.inf)
        return value if value == value else math.inf  # not a number is no best

    newest, best = int(keep.get("keep", 1)), int(keep.get("best", 0))
    every, hours = int(keep.get("keep_every", 0)), float(keep.get("keep_hours", 0))
    named: dict[str, Any] = {"newest" if newest == 1 else f"newest {newest}": policies.LatestN(newest)}
    if best:
        words = "least held-out loss" if best == 1 else f"least held-out loss, {best} steps"
        named[words] = policies.BestN(get_metric_fn=loss, reverse=True, n=best)
    if every:
        named[f"every {every}"] = policies.EveryNSteps(every)
    if hours:
        named[f"one in {hours:g} h"] = policies.EveryNSeconds(math.ceil(hours * 3600))
    return named


def why_kept(records: list[Record]) -> list[list[str]]:
    """Returns for each of a run's steps, oldest first, why it is kept by the newest one's settings."""
    from orbax.checkpoint import checkpoint_managers as policies

    if not records:
        return []
    context = policies.PreservationContext()
    reasons: list[list[str]] = [[] for _ in records]
    for words, policy in keep_policies(records[-1].keep).items():
        for row, kept in zip(reasons, policy.should_preserve(records, context=context), strict=True):
            row.extend([words] if kept else [])
    return reasons


@dataclasses.dataclass(frozen=True)
class Step:
    """A step of a run, as a listing shows it.

    Attributes:
      step: its number.
      nbytes: what it takes on disk.
      record: what it says of itself; None where that cannot be read.
      problem: what is wrong with it as far as names, sizes and small files tell, or None.
      kept: why it is kept; a step with no reason is removed after the next save.
    """

    step: int
    nbytes: int
    record: Record | None
    problem: str | None
    kept: list[str]


def list_steps(run: Path) -> list[Step]:
    """Returns a run's steps, oldest first."""
    steps: list[Step] = []
    for number, folder in step_folders(run).items():
        nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        try:
            manifest.verify(folder, quick=True)
            steps.append(Step(number, nbytes, read_record(folder), None, []))
        except CheckpointError as error:
            steps.append(Step(number, nbytes, None, str(error), []))
    whole = [step for step in steps if step.record is not None]
    for step, kept in zip(whole, why_kept([step.record for step in whole if step.record]), strict=True):
        step.kept.extend(kept)
    return steps
