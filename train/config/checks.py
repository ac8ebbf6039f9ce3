"""Checks of settings, whose errors name the setting, its value, and what would do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from llama_jax.console.parser import suggestion
from llama_jax.errors import ConfigError


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Checks that `value` is one of `choices`.

    Raises:
      ConfigError: naming the setting, its value, and the choices.
    """
    choices = list(choices)
    if value not in choices:
        close = suggestion(str(value), choices)
        raise ConfigError(f"{name} is {value!r}{close}; it must be one of {', '.join(choices)}")


def at_least(section: str, config: Any, **least: float) -> None:
    """Checks that attributes of `config` are finite and no less than given.

    Raises:
      ConfigError: naming section, attribute and value.
    """
    for name, low in least.items():
        value = getattr(config, name)
        if not low <= value < math.inf:
            raise ConfigError(f"{section}.{name} is {value}; it must be a number, at least {low}")
