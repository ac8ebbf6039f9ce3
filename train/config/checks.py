"""Validation of settings: errors name the setting, its value and the accepted values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.console.parser import suggestion
from llama_jax.errors import ConfigError

_MANY = 12  # of more choices than these, an error with a suggestion names only that


def check_one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Checks that `value` is one of `choices`.

    Raises:
      ConfigError: naming the setting, its value, and the choices.
    """
    choices = list(choices)
    if value not in choices:
        close = suggestion(str(value), choices)
        if close and len(choices) > _MANY:
            raise ConfigError(f"{name} is {value!r}{close}")
        raise ConfigError(f"{name} is {value!r}{close}; it must be one of {', '.join(choices)}")


def check_at_least(section: str, config: Any, **minimums: float) -> None:
    """Checks that attributes of `config` are finite and not below their minimum.

    Args:
      section: the section's name in the TOML file, for the error.
      config: the section's dataclass.
      **minimums: the minimum of each attribute, by its name.

    Raises:
      ConfigError: naming section, attribute and value.
    """
    for name, minimum in minimums.items():
        value = getattr(config, name)
        if not minimum <= value < math.inf:
            raise ConfigError(f"{section}.{name} is {value}; it must be a number, at least {minimum}")


def check_applies(
    section: str,
    config: Any,
    objectives_of: Mapping[str, Sequence[str]],
    objective: str,
    reasons: Mapping[str, str] = {},
) -> None:
    """Checks that no attribute of `config` is set that the objective does not have.

    Args:
      section: the section's name in the TOML file, for the error.
      config: the section's dataclass.
      objectives_of: the objectives that have an attribute, by its name; those not named apply to all.
      objective: `train.objective`.
      reasons: what the error says of why an attribute does not apply.

    Raises:
      ConfigError: naming the setting, and the objectives that it applies to.
    """
    for name, objectives in objectives_of.items():
        value = getattr(config, name)
        if objective in objectives or value == getattr(type(config), name):
            continue
        shown = f'"{value}"' if isinstance(value, str) else str(value).lower()
        shown = str(list(value)) if isinstance(value, tuple) else shown
        applies = " and ".join(f'"{one}"' for one in objectives)
        raise ConfigError(
            f'{section}.{name} is {shown} and train.objective "{objective}"{reasons.get(name, "")}; it '
            f"applies to {applies}: leave it out"
        )
