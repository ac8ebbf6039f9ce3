"""`[checkpoint]`: when steps are saved, and which are kept."""

from __future__ import annotations

import dataclasses
import math

from llama_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When steps are saved, and which stay.

    Attributes:
      every: save each time after so many steps; 0 is at the end only.
      every_minutes: save also when so long has passed since the last; 0 is off.
      keep: so many of the newest stay.
      keep_every: steps that are multiples of it stay for ever; 0 is off.
      keep_hours: one step in so many hours stays for ever; 0 is off.
      best: so many of the least held-out loss stay.
      asynchronous: write beside the training, instead of before it goes on.

    Raises:
      ConfigError: for a value that cannot work, naming field and value.
    """

    every: int = 1000
    every_minutes: float = 0.0
    keep: int = 3
    keep_every: int = 0
    keep_hours: float = 0.0
    best: int = 1
    asynchronous: bool = True

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("keep", 1), ("keep_every", 0), ("best", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(
                    f"checkpoint.{name} is {value!r}; it must be a whole number, at least {least}"
                )
        for name in ("every_minutes", "keep_hours"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ConfigError(f"checkpoint.{name} is {value!r}; it must be a finite number, at least 0")
        if type(self.asynchronous) is not bool:
            raise ConfigError(f"checkpoint.asynchronous is {self.asynchronous!r}; it must be true or false")
