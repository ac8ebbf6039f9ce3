"""The help of a run's settings: names, defaults and meanings, from the docstrings of the sections."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from typing import Any, get_type_hints

from llama_jax.adapters.lora import Lora
from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.console.parser import UsageError, suggestion

from .data import SourceConfig
from .run import RunConfig
from .settings import settings

# Where "as in `Name`" in a docstring refers to.
_REFERENCES = {cls.__name__: cls for cls in (LlamaConfig, Lora, RopeScaling, SourceConfig)}


def overview(width: int) -> str:
    """Each section's purpose and the names of its settings."""
    parts = []
    for name, cls in get_type_hints(RunConfig).items():
        names = ", ".join(field.name for field in dataclasses.fields(cls))
        parts += [_heading(name, cls, width), textwrap.fill(names, width, **_indents("    "))]
    return "\n".join(parts)


def names() -> list[str]:
    """The names of all settings, such as `train.steps`."""
    sections = get_type_hints(RunConfig).items()
    return [f"{section}.{key}" for section, cls in sections for key in settings(cls)]


def describe(topic: str, width: int) -> str:
    """The settings of a section, of all sections (`all`), or one (`train.steps`), with their meanings.

    Raises:
      UsageError: if there is no such section or setting, with the closest known one.
    """
    sections = get_type_hints(RunConfig)
    topic = topic.removeprefix("--").strip("[]")
    section, _, key = topic.partition(".")
    known = [*sections, "all"]
    if key and section in sections:
        known = [f"{section}.{name}" for name in settings(sections[section])]
    if topic not in known:
        hint = suggestion(topic, known) or f"; there are {', '.join(known)}"
        raise UsageError(f"no section or setting {topic[:60]!r}{hint}")
    blocks = [
        _describe_section(name, cls, width, only=key)
        for name, cls in sections.items()
        if section in (name, "all")
    ]
    return "\n\n".join(blocks)


def meanings(cls: Any) -> dict[str, str]:
    """The meaning of each field of a dataclass, from `Attributes:` of its docstring."""
    attributes = (inspect.getdoc(cls) or "").partition("\nAttributes:\n")[2].partition("\n\n")[0]
    found: dict[str, str] = {}
    for names, text in re.findall(r"^  (\w[\w, ]*?): (.*?)(?=\n  \w|\Z)", attributes, re.M | re.S):
        text = " ".join(text.split())
        reference = re.search(r"\bas in `(?:\w+\.)*(\w+)`", text)
        other = meanings(_REFERENCES[reference[1]]) if reference and reference[1] in _REFERENCES else {}
        if names.endswith(" and the rest"):
            found |= {field.name: other.get(field.name, text) for field in dataclasses.fields(cls)} | found
        found |= {name: other.get(name, text) for name in names.split(", ") if " " not in name}
    return {field.name: found.get(field.name, "") for field in dataclasses.fields(cls)}


def _describe_section(section: str, cls: Any, width: int, only: str) -> str:
    lines = [] if only else [_heading(section, cls, width)]
    for name, setting in settings(cls).items():
        if only in ("", name):
            text = meanings(setting.owner)[setting.field.name]
            lines.append(f"  --{section}.{name} {_default(setting.field.default)}".rstrip())
            lines.append(textwrap.fill(text, width, **_indents("      ")))
    return "\n".join(lines)


def _heading(section: str, cls: Any, width: int) -> str:
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    return textwrap.fill(f"[{section}]  {summary}", width, subsequent_indent="  ")


def _default(value: Any) -> str:
    """A default as it would be written on the command line; nothing if there is none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value in (None, dataclasses.MISSING) else str(value)


def _indents(indent: str) -> dict[str, Any]:
    return {"initial_indent": indent, "subsequent_indent": indent, "break_on_hyphens": False}
