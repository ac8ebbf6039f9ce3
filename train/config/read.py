"""A `RunConfig` from a TOML file and the `--section.key VALUE` words of a command line; and back to TOML."""

from __future__ import annotations

import dataclasses
import reprlib
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from llama_jax.console.parser import UsageError, suggestion
from llama_jax.errors import ConfigError

from .run import RunConfig

# Former names of settings, for the error that names the new one.
RENAMED = {
    "train.batch_size": "train.global_batch_size",
    "train.accumulate": "train.gradient_accumulation_steps",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "optimizer.final_fraction": "optimizer.min_lr_ratio",
    "data.held_out": "data.validation_fraction",
    "data.held_out_files": "data.validation_files",
    "adapter.kind": "adapter.type",
    "adapter.targets": "adapter.target_modules",
    "preference.kind": "preference.loss_type",
    "preference.reference": "preference.precompute_ref_log_probs",
    "distributed.processes": "distributed.num_processes",
    "distributed.process": "distributed.process_id",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's configuration.

    Args:
      path: a TOML file.
      overrides: words such as `--train.steps 40` or `--train.steps=40`; the last of a key wins.

    Raises:
      ConfigError: for a file that cannot be read, an unknown section or key, or a value that cannot work,
        each with its name and, for a mistyped name, the closest one.
    """
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give a .toml file") from None
    except (ValueError, RecursionError) as error:  # nested or numbered beyond what Python reads, too
        raise ConfigError(f"{path}: not TOML: {error}") from None
    sections = _fields(RunConfig)
    for name, section in table.items():
        if name not in sections:
            raise ConfigError(f"{path}: unknown section [{name}]{_close(name, sections)}")
        if not isinstance(section, Mapping):
            raise ConfigError(f"{path}: {name} is {section!r}; it must be a section, [{name}]")
        for key in section:
            _check_key(f"{path}: ", name, key)
    for name, key, text in _words(overrides):
        table.setdefault(name, {})[key] = _parse(f"--{name}.{key}", text, _fields(sections[name])[key])
    return _build(RunConfig, table, "")


def to_toml(config: RunConfig) -> str:
    """The TOML of a configuration, every key in it, so that defaults of another version change nothing."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return tomli_w.dumps(plain(dataclasses.asdict(config)))


def keys() -> dict[str, list[tuple[str, str]]]:
    """Every section with its keys and their defaults as TOML would write them: what `--help` shows."""
    shown = {}
    for name, section in _fields(RunConfig).items():
        shown[name] = [
            (f.name, "" if f.default in (None, dataclasses.MISSING) else str(f.default))
            for f in dataclasses.fields(section)
        ]
    return shown


def _fields(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _close(word: str, known: Any) -> str:
    return suggestion(word, known) or f"; there are {', '.join(known)}"


def _check_key(where: str, section: str, key: str) -> None:
    known = _fields(_fields(RunConfig)[section])
    if key not in known:
        raise ConfigError(f"{where}unknown key {section}.{key}{_renamed(section, key) or _close(key, known)}")


def _renamed(section: str, key: str) -> str:
    new = RENAMED.get(f"{section}.{key}")
    return f"; it is now {new}" if new else ""


def _words(words: Sequence[str]) -> list[tuple[str, str, str]]:
    """(section, key, value) of each override."""
    found, pending, sections = [], list(words), _fields(RunConfig)
    dotted = [f"{name}.{key}" for name, cls in sections.items() for key in _fields(cls)]
    while pending:
        word = pending.pop(0)
        if not word.startswith("--"):
            raise UsageError(f"unexpected argument {word!r}; settings are --section.key VALUE")
        name, equals, value = word[2:].partition("=")
        if name not in dotted:
            close = _renamed(*name.split(".", 1)) if "." in name else ""
            raise UsageError(
                f"unknown setting --{name}{close or suggestion(name, dotted) or '; see: --help'}"
            )
        if not equals:
            if not pending:
                raise UsageError(f"--{name} needs a value")
            value = pending.pop(0)
        section, _, key = name.partition(".")
        found.append((section, key, value))
    return found


def _parse(name: str, text: str, kind: Any) -> Any:
    """The text of an override as TOML would have it: text stays text where text is wanted."""
    kinds = _alternatives(kind)
    if str in kinds or any(get_origin(k) is Literal for k in kinds):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        raise ConfigError(f"{name} is {_short(text)}; it must be {_describe(kind)}") from None


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _build(cls: Any, table: Mapping[str, Any], where: str) -> Any:
    fields = _fields(cls)
    for key in table:
        if key not in fields:
            raise ConfigError(f"unknown key {where}{key}{_close(key, fields)}")
    for field in dataclasses.fields(cls):
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in table:
            raise ConfigError(f"{where}{field.name} is missing; give {_describe(fields[field.name])}")
    return cls(**{key: _convert(value, fields[key], f"{where}{key}") for key, value in table.items()})


def _convert(value: Any, kind: Any, where: str) -> Any:
    for one in _alternatives(kind):
        if dataclasses.is_dataclass(one) and isinstance(value, Mapping):
            return _build(one, value, f"{where}.")
        if get_origin(one) is tuple and isinstance(value, list):
            return tuple(_convert(item, get_args(one)[0], where) for item in value)
        if get_origin(one) is Literal and isinstance(value, str):
            return value  # whether it is one of them, the dataclass says
        if one is float and type(value) is int and abs(value) < 1 << 1000:
            return float(value)
        if one in (int, float, str, bool) and type(value) is one:
            return value
    raise ConfigError(f"{where} is {_short(value)}; it must be {_describe(kind)}")


def _short(value: Any) -> str:
    return reprlib.repr(value)


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    kinds = [k for k in _alternatives(kind) if k is not type(None)]

    def name(kind: Any) -> str:
        if dataclasses.is_dataclass(kind):
            return f"a table of {', '.join(_fields(kind))}"
        return names.get(kind, "a list" if get_origin(kind) is tuple else "text")

    return " or ".join(map(name, kinds))
