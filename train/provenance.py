"""What a run was started with: recorded in its checkpoints, and compared when it is resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax import LlamaConfig
from llama_jax.errors import CheckpointError, ConfigError, DataError
from llama_jax.storage import as_path
from llama_jax.weights.run_adapters import CONTEXT, context_fields, portable_path, step_fields
from llama_jax.weights.runs import StepMetadata, read_step_metadata, step_folders

from .config.read import load_config
from .config.run import RunConfig
from .gather import gather_bytes
from .trainable import TrainableSpec

CONFIG_FILE = "config.toml"
# Settings that a run keeps, as its batches or the leaves of its checkpoints depend on them.
_FIXED: tuple[str, ...] = (
    "train.seed",
    "train.seq_len",
    "train.global_batch_size",
    "train.objective",
    "optimizer.name",
)
_FIXED += ("rl.num_generations", "rl.num_iterations", "rl.steps_per_generation")
_ADAPTER = ("type", "rank", "alpha", "target_modules", "rslora", "dora", "bottleneck_size", "prefix_length")
# Settings that the data's fingerprint depends on, beside the files and the tokenizer.
_DATA: tuple[str, ...] = ("validation_fraction", "validation_files", "shuffle", "format", "field", "exclude")
_DATA += ("mixture", "template", "too_long", "labels")
# Paths, and what else may differ between the processes of a run.
_OWN: tuple[str, ...] = (
    "distributed",
    "log",
    "data.files",
    "data.validation_files",
    "data.exclude",
    "data.mixture",
)
_OWN += ("data.workers", "data.template", "tokenizer.path", "model.init_from", "distillation.teacher")
_OWN += ("rl.reference", "rl.value_model", "train.run_dir")
_OTHER_MODELS = ("distillation.teacher", "rl.value_model")
_PATHS = ("model.init_from", "tokenizer.path", *_OTHER_MODELS)


def settings_of(run: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON has them: lists for tuples."""
    sections = json.loads(json.dumps(dataclasses.asdict(run)))
    return {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}


def provenance(
    run: RunConfig,
    run_dir: Path,
    started: StepMetadata | None = None,
    *,
    data: str,
    model: LlamaConfig,
    spec: TrainableSpec,
    base: str | None,
    base_model: str,
    teacher: str | None = None,
    value_model: str | None = None,
) -> dict[str, Any]:
    """The record of a run, for its checkpoints; JSON-serializable.

    Args:
      run: the configuration as it was given.
      run_dir: the run's directory.
      started: the record of an earlier start.
      data: the fingerprint of its data.
      model: the model's configuration.
      spec: which parameters are trained.
      base: the fingerprint of the frozen or reference weights; None if it has none.
      base_model: the base model's path or name.
      teacher, value_model: the fingerprints of their frozen weights; None without them.
    """
    paths = {}
    for name in _PATHS:
        place = place_of(run, run_dir, started, name)
        if place is None and started is not None:  # nothing is left of it: remember where it was
            paths[name] = started.run["paths"][name]
        elif place:
            paths[name] = portable_path(place, run_dir)
    return {
        "data": data,
        "model": json.loads(json.dumps(dataclasses.asdict(model))),
        "base": base,
        **({} if teacher is None else {"teacher": teacher}),
        **({} if value_model is None else {"value_model": value_model}),
        "settings": settings_of(run),
        "paths": paths,
        **({} if spec.adapter is None else step_fields(spec.adapter, base_model, run_dir)),
        **({CONTEXT: context_fields(model)} if spec.adapter and run.model.extends_context else {}),
    }


def read_started(run_dir: Path) -> StepMetadata | None:
    """The record in a run's newest readable step; None for a run without one.

    Steps of earlier versions do not record the settings: those of the last start are in config.toml.
    """
    for folder in reversed(step_folders(run_dir).values()):
        with contextlib.suppress(CheckpointError):  # reported when it is restored
            started = read_step_metadata(folder)
            if "settings" not in started.run:
                with contextlib.suppress(ConfigError):
                    settings = settings_of(load_config(run_dir / CONFIG_FILE))
                    return dataclasses.replace(started, run={**started.run, "settings": settings})
            return started
    return None


def is_as_started(run: RunConfig, started: StepMetadata | None, name: str) -> bool:
    """Whether a setting is what the run was started with; False for a run that has not begun."""
    settings = {} if started is None else started.run.get("settings", {})
    return name in settings and settings[name] == _value(run, name)


def is_same_model(run: RunConfig, started: StepMetadata) -> bool:
    """Whether a run starts from the same model, extended in the same way, as it was started with."""
    saved, current = started.run.get("settings", {}), settings_of(run)
    names = ("max_position_embeddings", "rope_theta", "rope_scaling")
    same = all(saved.get(f"model.{name}") == current[f"model.{name}"] for name in names)
    return same and is_as_started(run, started, "model.init_from")


def place_of(run: RunConfig, run_dir: Path, started: StepMetadata | None, name: str) -> str | None:
    """Where the file of a setting is: as given; where it was when the run was started; or beside the run.

    Args:
      run: the configuration.
      run_dir: the run's directory.
      started: the record of the run.
      name: `model.init_from` or `tokenizer.path`.

    Returns:
      The path or name; None if it was a local path when the run was started, and nothing is left of it.
    """
    given = str(_value(run, name))
    if started is None or not is_as_started(run, started, name):
        return given
    absolute, relative = started.run.get("paths", {}).get(name, (given, None))
    if relative is None or as_path(given).expanduser().exists():  # a name, such as that of a known model
        return given
    return next(
        (str(path) for path in (as_path(absolute), (run_dir / relative).absolute()) if path.exists()), None
    )


def needs_base(run: RunConfig) -> bool:
    """Whether every start of a run reads the weights of `model.init_from`, not only the first."""
    return run.adapter.type != "none" or run.has_reference


def with_places(run: RunConfig, run_dir: Path, started: StepMetadata | None) -> RunConfig:
    """The configuration with the present places of its base model and tokenizer, see `place_of`.

    Raises:
      ConfigError: if the base model is needed, and nothing is left of it.
    """
    for name in _PATHS:
        place = place_of(run, run_dir, started, name)
        needed = name in _OTHER_MODELS or (name == "model.init_from" and needs_base(run))
        if place is None and needed:
            raise ConfigError(
                f"{name} {_value(run, name)!r}: the weights that the run in {run_dir} was started on are not "
                f"there any more; put them back, or give their new place with --{name}"
            )
        section, _, key = name.partition(".")
        if place not in (None, _value(run, name)):
            config = dataclasses.replace(getattr(run, section), **{key: place})
            run = dataclasses.replace(run, **{section: config})
    return run


def check_settings(run: RunConfig, run_dir: Path, started: StepMetadata | None) -> None:
    """Checks that a run is resumed with the settings that it keeps.

    Raises:
      ConfigError: naming the setting, with both values.
    """
    if started is None:
        return
    saved, current = started.run.get("settings", {}), settings_of(run)
    for name in (*_FIXED, *(f"adapter.{key}" for key in _ADAPTER)):
        if name in saved and saved[name] != current[name]:
            raise ConfigError(
                f"{name} is {_show(current[name])} and the run in {run_dir} was started with "
                f"{_show(saved[name])}: set it to that, or choose another train.run_dir"
            )


def check_model(run: RunConfig, model: LlamaConfig, run_dir: Path, started: StepMetadata | None) -> None:
    """Checks that a resumed run trains a model of the same configuration.

    Raises:
      ConfigError: naming the setting, with both values.
    """
    if started is None:
        return
    saved, settings = _flat(started.config), started.run.get("settings", {})
    for name, value in _flat(model).items():
        if saved.get(name, value) == value:
            continue
        key = name.partition(".")[0]
        setting = "data.labels" if name == "labels" else f"model.{name}"
        given = [getattr(run.model, key, None), settings.get(f"model.{key}")]
        if run.model.init_from and name not in ("labels", "vocab_size") and given == [None, None]:
            setting = f"the {name} of model.init_from"
        raise ConfigError(
            f"{setting} is {_show(value)} and the run in {run_dir} was started with {_show(saved[name])}: "
            "set it to that, or start another run with --train.run_dir and --model.init_from"
        )


def check_data(
    run: RunConfig,
    current: Mapping[str, Any],
    run_dir: Path,
    started: StepMetadata,
    is_of: Callable[[str], bool],
) -> None:
    """Checks that a resumed run reads the same data in the same order, on the same base weights.

    Args:
      run: the configuration.
      current: its `provenance`.
      run_dir: the run's directory.
      started: the record of the run.
      is_of: whether a fingerprint is that of the present data, see `Data.is_of`.

    Raises:
      DataError, ConfigError: naming the settings that differ, or saying that the files have changed.
    """
    if not is_of(started.run.get("data", "")):
        saved = started.run.get("settings", {})
        names = [*(f"data.{key}" for key in _DATA), "distillation.data"]
        changed = [name for name in names if name in saved and saved[name] != current["settings"][name]]
        if changed:
            listed = "; ".join(
                f"{name} is {_show(current['settings'][name])}, and was {_show(saved[name])}"
                for name in changed
            )
            raise ConfigError(
                f"the batches are not those that the run in {run_dir} was started with: {listed}; set it to "
                "that, or start another run with --train.run_dir and --model.init_from"
            )
        raise DataError(
            f"{run_dir}: the data is not what this run was started with ({_files(run)} or the tokenizer have "
            "changed); restore it, or start another run with --train.run_dir and --model.init_from"
        )
    base = started.run.get("base")
    if base is not None and base != current["base"]:
        trained = "the run" if run.adapter.type == "none" else "the adapter"
        raise ConfigError(
            f"model.init_from holds other weights than those that {trained} in {run_dir} was started on; "
            "give those, or choose another train.run_dir"
        )
    for key, setting in (("teacher", "distillation.teacher"), ("value_model", "rl.value_model")):
        if key in started.run and started.run[key] != current.get(key):
            raise ConfigError(
                f"{setting} holds other weights than those that {run_dir} was started with; give those, or "
                "choose another train.run_dir"
            )


def check_agreement(run: RunConfig) -> None:
    """Checks that all processes were started with the same settings, but for their own ones and for paths.

    Raises:
      ConfigError: in every process, naming a setting that differs, with both values.
    """
    if jax.process_count() == 1:
        return
    settings = settings_of(run)
    shared = {
        name: value
        for name, value in settings.items()
        if name not in _OWN and name.partition(".")[0] not in _OWN
    }
    first, *others = map(json.loads, gather_bytes(json.dumps(shared).encode()))
    for process, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first.get(name):
                raise ConfigError(
                    f"{name} is {_show(value)} in process {process} and {_show(first.get(name))} in process "
                    "0; start every process of a run with the same settings"
                )


def _value(run: RunConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    return getattr(getattr(run, section), key)


def _flat(model: LlamaConfig) -> dict[str, Any]:
    """The fields of a configuration as JSON has them; those of its rope scaling first, by dotted names."""
    fields = json.loads(json.dumps(dataclasses.asdict(model)))
    scaling = fields.pop("rope_scaling") or {"kind": "default"}
    scaling = {"rope_type": scaling.pop("kind"), **scaling}
    return {**{f"rope_scaling.{name}": value for name, value in scaling.items()}, **fields}


def _files(run: RunConfig) -> str:
    names: Sequence[str] = [repr(source.files) for source in run.data.sources]
    return f"the files of {', '.join(names[:4])}"


def _show(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (str, list, dict, bool)) else str(value)
