"""Plans of compiled steps, kept in the user's cache folder by a hash of all that they depend on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_jax
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.plan.result import Memory, Part, StepPlan, Traffic
from llama_jax.plan.topology import Topology
from llama_jax.storage.atomic import write_atomically
from llama_jax.storage.cache import cache_folder

from ..config.run import RunConfig

_FOLDER = "plans"
# The sections that `build_step` reads; and their keys that change nothing in a program.
_SECTIONS = ("train", "optimizer", "adapter", "preference", "rl", "mesh")
_UNREAD = {"run_dir", "topology"}


def cache_key(run: RunConfig, model: LlamaConfig, topology: Topology, flags: Mapping[str, str]) -> str:
    """A hash of a compiled step's inputs: settings, model, slices, flags, versions and this package's source.

    Args:
      run: the run's configuration.
      model: the model that it trains.
      topology: the slices that it is compiled for.
      flags: the compiler's flags that are not set for every run.
    """
    sections = {name: dataclasses.asdict(getattr(run, name)) for name in _SECTIONS}
    for section in sections.values():
        for key in _UNREAD & section.keys():
            del section[key]
    inputs = {
        "run": sections,
        "model": dataclasses.asdict(model),
        "topology": dataclasses.asdict(topology),
        "flags": dict(flags),
        "environment": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "versions": [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")],
        "source": _source_digest(),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


@functools.cache
def _source_digest() -> str:
    """Of every Python file of the library and the trainer."""
    digest = hashlib.sha256()
    folders = (Path(llama_jax.__file__).parent, Path(__file__).parents[1])
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def read(key: str) -> dict[str, Any] | None:
    """What was stored under a key; None if there is nothing, or what is there is damaged."""
    try:
        answer = json.loads(_path(key).read_text())
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def write(key: str, answer: Mapping[str, Any]) -> None:
    """Stores an answer, whole or not at all; a folder that cannot be written to is no error."""
    with contextlib.suppress(InputError, OSError):
        write_atomically(_path(key), json.dumps(answer))


def _path(key: str) -> Path:
    return cache_folder() / _FOLDER / f"{key}.json"


def plan_from_json(fields: Mapping[str, Any]) -> StepPlan:
    """A plan from `dataclasses.asdict` of it, as JSON keeps it.

    Raises:
      KeyError, TypeError, ValueError: if it is not one.
    """
    return StepPlan(
        **{
            **fields,
            "memory": Memory(**fields["memory"]),
            "parts": tuple(Part(**part) for part in fields["parts"]),
            "traffic": tuple(Traffic(**one) for one in fields["traffic"]),
            "notes": tuple(fields["notes"]),
        }
    )
