"""Reads a `RunConfig` from a TOML file and `--section.key VALUE` flags, and writes it back as TOML."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

from llama_jax.console.parser import UsageError, suggestion
from llama_jax.errors import ConfigError
from llama_jax.storage import as_path, is_address

from .run import RunConfig
from .settings import ALIASES, ELSEWHERE, alternatives, settings

# Former names of settings: the error for an old name gives the new one.
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
# Former values of settings, likewise.
RENAMED_VALUES = {"train.remat": {"dots": "save_projections"}}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's configuration.

    Args:
      path: a TOML file.
      overrides: flags such as `--train.steps 40` or `--train.steps=40`; the last one for a key wins.

    Raises:
      ConfigError: for a file that cannot be read, an unknown section or key, or an invalid value; a mistyped
        name comes with the closest known one, a renamed one with its new name.
      UsageError: for an unknown flag or a flag without a value.
    """
    try:
        table = tomllib.loads(as_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give a .toml file") from None
    except (ValueError, RecursionError) as error:  # also nesting and numbers beyond Python's limits
        raise ConfigError(f"{path}: not TOML: {error}") from None
    sections = _fields(RunConfig)
    for name, section in table.items():
        if name not in sections:
            raise ConfigError(f"{path}: unknown section [{name}]{_closest(name, sections)}")
        if not isinstance(section, Mapping):
            raise ConfigError(f"{path}: {name} is {section!r}; it must be a section, [{name}]")
        known = _fields(sections[name])
        for key in section:
            if key not in known:
                new = RENAMED.get(f"{name}.{key}")
                hint = f"; it is now {new}" if new else _closest(key, known)
                raise ConfigError(f"{path}: unknown key {name}.{key}{hint}")
    for name, key, text in _parse_flags(overrides):
        annotation = settings(sections[name])[key].annotation
        *tables, last = name, *key.split(".")
        target, place = table, ""
        for part in tables:
            target, place = target.setdefault(part, {}), f"{place}{part}."
            if not isinstance(target, dict):
                raise ConfigError(f"{path}: {place[:-1]} is {target!r}; it must be a table")
            _replace_aliases(target, place)
        target[last] = _parse_value(f"--{name}.{key}", text, annotation)
    return _build(RunConfig, table, "")


def to_toml(config: RunConfig) -> str:
    """Writes a configuration as TOML, with every key, so that later changes of defaults do not affect it."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return tomli_w.dumps(plain(dataclasses.asdict(config)))


def keys() -> dict[str, list[tuple[str, str]]]:
    """Returns (key, default) of every setting, by section: what `--help` prints."""
    return {
        name: [
            (key, "" if s.field.default in (None, dataclasses.MISSING) else str(s.field.default))
            for key, s in settings(section).items()
        ]
        for name, section in _fields(RunConfig).items()
    }


def _fields(cls: Any) -> dict[str, Any]:
    """The types of a dataclass's fields, by name."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _closest(name: str, known: Any) -> str:
    return suggestion(name, known) or f"; there are {', '.join(known)}"


def _parse_flags(arguments: Sequence[str]) -> list[tuple[str, str, str]]:
    """(section, key, value) of each flag."""
    parsed, pending, sections = [], list(arguments), _fields(RunConfig)
    known = [f"{name}.{key}" for name, cls in sections.items() for key in settings(cls)]
    while pending:
        argument = pending.pop(0)
        if not argument.startswith("--"):
            raise UsageError(f"unexpected argument {argument!r}; settings are --section.key VALUE")
        name, equals, value = argument[2:].partition("=")
        name = ALIASES.get(name, name)
        if name not in known:
            new = RENAMED.get(name)
            hint = f"; it is now --{new}" if new else suggestion(name, known) or "; see: --help"
            hint = f"; that is --{ELSEWHERE[name]}" if name in ELSEWHERE else hint
            raise UsageError(f"unknown setting --{name}{hint}")
        if not equals:
            if not pending:
                raise UsageError(f"--{name} needs a value")
            value = pending.pop(0)
        section, _, key = name.partition(".")
        parsed.append((section, key, value))
    return parsed


def _parse_value(name: str, text: str, annotation: Any) -> Any:
    """Parses the value of a flag as TOML, except that strings need no quotes.

    Numbers may also be written as Python does, `.0001` or `3.e-4`, and lists without brackets, `wq,wv`.
    """
    types_ = alternatives(annotation)
    if str in types_ and tuple[str, ...] in types_:
        return _parse_names(text)
    if str in types_ or any(get_origin(t) is Literal for t in types_):
        return text
    for target in types_:
        if get_origin(target) is tuple and not text.lstrip().startswith("["):
            items = [item.strip() for item in text.split(",") if item.strip()]
            return [_parse_value(name, item, get_args(target)[0]) for item in items]
    if any(map(dataclasses.is_dataclass, types_)):  # also as JSON, {"rope_type": "yarn"}
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        if float in types_ and _NUMBER.fullmatch(text.strip()):
            return float(text)
        raise ConfigError(f"{name} is {reprlib.repr(text)}; it must be {_describe(annotation)}") from None


def _parse_names(text: str) -> str | list[str]:
    """Parses one name, or several: `a,b`, or a list as TOML and JSON write it, for names with commas."""
    if text.lstrip().startswith("["):  # which also begins a glob, [ab]*.txt
        with contextlib.suppress(ValueError, RecursionError):
            names = tomllib.loads(f"value = {text}")["value"]
            if all(isinstance(name, str) for name in names):
                return names
    if "," not in text or (not is_address(text) and Path(text).exists()):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def _replace_aliases(table: dict[str, Any], prefix: str) -> None:
    """Gives keys that are known under two names the first one."""
    for key in [key for key in table if f"{prefix}{key}" in ALIASES]:
        value, name = table.pop(key), ALIASES[f"{prefix}{key}"].removeprefix(prefix)
        if table.setdefault(name, value) != value:
            raise ConfigError(f"{prefix}{key} is {value!r} and {prefix}{name} {table[name]!r}: remove one")


def _build(cls: Any, table: Mapping[str, Any], prefix: str) -> Any:
    """Makes a dataclass from a TOML table; `prefix` is the table's dotted name, for errors."""
    fields, table = _fields(cls), dict(table)
    _replace_aliases(table, prefix)
    for key in table:
        if key not in fields:
            other = ELSEWHERE.get(f"{prefix}{key}")
            hint = f"; that is {other}" if other else _closest(key, fields)
            raise ConfigError(f"unknown key {prefix}{key}{hint}")
    for field in dataclasses.fields(cls):
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in table:
            raise ConfigError(f"{prefix}{field.name} is missing; give {_describe(fields[field.name])}")
    return cls(**{key: _convert(value, fields[key], f"{prefix}{key}") for key, value in table.items()})


def _convert(value: Any, annotation: Any, name: str) -> Any:
    """Converts a TOML value to a field's type: tables to dataclasses, lists to tuples, integers to floats."""
    for target in alternatives(annotation):
        if dataclasses.is_dataclass(target) and isinstance(value, Mapping):
            return _build(target, value, f"{name}.")
        if get_origin(target) is tuple and isinstance(value, list):
            return tuple(_convert(item, get_args(target)[0], name) for item in value)
        if get_origin(target) is Literal and isinstance(value, str):
            if new := RENAMED_VALUES.get(name, {}).get(value):
                raise ConfigError(f"{name} is {value!r}, which is now {new!r}")
            return value  # the dataclass checks that it is one of the choices
        if target is float and type(value) is int and abs(value) < 1 << 1000:
            return float(value)
        if target in (int, float, str, bool) and type(value) is target:
            return value
    raise ConfigError(f"{name} is {reprlib.repr(value)}; it must be {_describe(annotation)}")


def _describe(annotation: Any) -> str:
    """A type in the words of an error message."""
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}

    def describe(target: Any) -> str:
        if dataclasses.is_dataclass(target):
            return f"a table of {', '.join(_fields(target))}"
        if get_origin(target) is tuple:
            return 'a list such as ["a", "b"]' if str in get_args(target) else "a list"
        return names.get(target, "a string")

    return " or ".join(describe(t) for t in alternatives(annotation) if t is not type(None))
