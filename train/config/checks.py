"""Validation of settings: errors name the setting, its value and the accepted values."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
