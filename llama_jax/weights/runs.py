"""A training run's directory: its steps, their metadata, and the retention policies of checkpoints.

RUN/config.toml  metrics.jsonl  tokenizer.*
RUN/checkpoints/STEP/  checksums.json
                       params/     the parameters, an Orbax tree
                       state/      the rest of the training state, an Orbax tree
                       data/       process_N.json: each process's data iterator state
                       metrics/    metrics: used to select the best steps
                       run/        run.json: the model configuration and the trainer's metadata
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
from llama_jax.storage import StorePath, local_file
from llama_jax.storage.sizes import file_sizes
from llama_jax.weights import manifest
from llama_jax.weights.json_fields import read_json
from llama_jax.weights.source import os_error_reason, quote

CHECKPOINTS = "checkpoints"
PARAMS, STATE, DATA, METRICS, RUN = "params", "state", "data", "metrics", "run"
STEP_METADATA_FILE = "run.json"
BEST_METRIC = "eval_loss"  # lower is better
DAMAGED_SUFFIX = ".damaged"  # appended to the name of a damaged step's directory


@dataclasses.dataclass(frozen=True)
class StepMetadata:
    """The metadata of a saved step.

    Attributes:
      step: number of optimizer updates.
      config: the model configuration.
      metrics: metrics at this step, by name.
      keep: the run's retention settings, as for `keep_policies`.
      run: other metadata of the trainer.
      time: when the step was saved.
    """

    step: int
    config: LlamaConfig
    metrics: Mapping[str, float]
    keep: Mapping[str, float]
    run: Mapping[str, Any]
    time: datetime.datetime


def is_run(path: Path) -> bool:
    """Whether a directory is that of a training run, with or without checkpoints."""
    return (path / CHECKPOINTS).is_dir() or (path / "config.toml").is_file()


def step_folders(run: Path) -> dict[int, Path]:
    """Returns the directories of a run's saved steps, oldest first; their files are not checked.

    Raises:
      CheckpointError: if the directory cannot be read.
    """
    folder = run / CHECKPOINTS
    try:
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read: {os_error_reason(error)}; check its permissions"
        ) from None
    steps = sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 19)
    return {step: folder / str(step) for step in steps if _is_committed(folder / str(step))}


def _is_committed(step: Path) -> bool:
    """Whether a step is complete: on a disk if it has its name, in a store if it has its manifest."""
    return step.is_dir() if local_file(step) else (step / manifest.NAME).is_file()


def read_step_metadata(step: Path) -> StepMetadata:
    """Reads the metadata of the step in a directory.

    Raises:
      CheckpointError: if a file is missing or malformed.
    """
    path = step / RUN / STEP_METADATA_FILE
    fields = read_json(path)
    metrics = read_json(step / METRICS / METRICS) if (step / METRICS).exists() else {}
    model, keep, run = sections = [fields.get(name) for name in ("model", "keep", "run")]
    seconds = fields.get("time")
    valid = type(fields.get("step")) is int and all(isinstance(section, dict) for section in sections)
    if not valid or type(seconds) is not float or not 0 <= seconds < 1e11:
        raise CheckpointError(f"{path}: not written by the trainer: it needs step, time, model, keep and run")
    numbers = {name: value for name, value in metrics.items() if type(value) in (int, float)}
    time = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return StepMetadata(fields["step"], config_from_fields(path, model), numbers, keep or {}, run or {}, time)


def config_from_fields(path: Path, fields: Any) -> LlamaConfig:
    """Builds a configuration from its fields, as `dataclasses.asdict` returns them.

    Raises:
      CheckpointError: for unknown fields or invalid values.
    """
    try:
        fields = dict(fields)
        if fields.get("rope_scaling") is not None:
            fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
        fields["labels"] = tuple(fields.get("labels", ()))
        return LlamaConfig(**fields)
    except (TypeError, ValueError, ConfigError) as error:
        detail = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: invalid model configuration: {quote(detail)}") from None


def keep_policies(keep: Mapping[str, float]) -> dict[str, Any]:
    """Returns Orbax's preservation policies, by a short description of each.

    Args:
      keep: the trainer's settings by name: the `keep` newest steps, the `best` steps with the lowest
        eval_loss, every `keep_every`-th step, and one in `keep_hours` hours; 0 disables a policy.
    """
    from orbax.checkpoint import checkpoint_managers as policies

    def loss(metrics: Any) -> float:
        value = (metrics or {}).get(BEST_METRIC, math.inf)
        return value if value == value else math.inf  # NaN is never the best

    newest, best = int(keep.get("keep", 1)), int(keep.get("best", 0))
    every, hours = int(keep.get("keep_every", 0)), float(keep.get("keep_hours", 0))
    named: dict[str, Any] = {"newest" if newest == 1 else f"newest {newest}": policies.LatestN(newest)}
    if best:
        name = "lowest eval_loss" if best == 1 else f"lowest eval_loss, {best} steps"
        named[name] = policies.BestN(get_metric_fn=loss, reverse=True, n=best)
    if every:
        named[f"every {every}"] = policies.EveryNSteps(every)
    if hours:
        named[f"one in {hours:g} h"] = policies.EveryNSeconds(math.ceil(hours * 3600))
    return named


def retention_reasons(steps: list[StepMetadata]) -> list[list[str]]:
    """Returns the names of the policies that keep each step (oldest first), by the newest step's settings."""
    from orbax.checkpoint import checkpoint_managers as policies

    if not steps:
        return []
    context = policies.PreservationContext()
    reasons: list[list[str]] = [[] for _ in steps]
    for name, policy in keep_policies(steps[-1].keep).items():
        for step_reasons, kept in zip(reasons, policy.should_preserve(steps, context=context), strict=True):
            step_reasons.extend([name] if kept else [])
    return reasons


@dataclasses.dataclass(frozen=True)
class Step:
    """A saved step, for listings.

    Attributes:
      step: number of optimizer updates.
      nbytes: size on disk.
      metadata: its metadata; None if it cannot be read.
      problem: the error found by checking names, sizes and small files, or None.
      kept_by: the policies that keep it; a step without one is removed after the next save.
    """

    step: int
    nbytes: int
    metadata: StepMetadata | None
    problem: str | None
    kept_by: list[str]


def _size(folder: Path) -> int:
    if isinstance(folder, StorePath):
        return sum(info.size for info in folder.find().values())
    return sum(file_sizes(folder))  # training may remove the step meanwhile


def list_steps(run: Path) -> list[Step]:
    """Returns a run's steps, oldest first."""
    steps: list[Step] = []
    for number, folder in step_folders(run).items():
        nbytes = 0
        try:
            nbytes = _size(folder)
            manifest.verify(folder, quick=True)
            steps.append(Step(number, nbytes, read_step_metadata(folder), None, []))
        except (CheckpointError, OSError) as error:
            if folder.exists():  # else the run has deleted it meanwhile
                steps.append(Step(number, nbytes, None, str(error), []))
    intact = [step for step in steps if step.metadata is not None]
    reasons = retention_reasons([step.metadata for step in intact if step.metadata])
    for step, kept_by in zip(intact, reasons, strict=True):
        step.kept_by.extend(kept_by)
    return steps
