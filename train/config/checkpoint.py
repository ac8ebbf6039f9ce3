"""`[checkpoint]`: when checkpoints are saved, and how long they are retained."""

from __future__ import annotations

import dataclasses
import math

from llama_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved, and which of them are retained.

    Attributes:
      every: steps between checkpoints; 0 saves at the end only.
      every_minutes: also save when this many minutes have passed since the last save; 0 is off.
      keep: number of newest checkpoints to retain.
      keep_every: retain forever the steps that are multiples of it; 0 is off.
      keep_hours: retain one checkpoint per this many hours forever; 0 is off.
      best: number of checkpoints with the lowest eval_loss to retain.
      local_every: steps between copies of the state on each host, from which a restart resumes if it can;
        0 is off.
      local_dir: the directory of the copies, on each host in memory or on a disk of its own, such as
        /dev/shm/llama_jax.
      asynchronous: write checkpoints in the background instead of blocking the training loop.

    Raises:
      ConfigError: for an invalid value, naming field and value.
    """

    every: int = 1000
    every_minutes: float = 0.0
    keep: int = 3
    keep_every: int = 0
    keep_hours: float = 0.0
    best: int = 1
    local_every: int = 0
    local_dir: str = ""
    asynchronous: bool = True

    def __post_init__(self) -> None:
        for name, minimum in (("every", 0), ("keep", 1), ("keep_every", 0), ("best", 0), ("local_every", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < minimum:
                raise ConfigError(
                    f"checkpoint.{name} is {value!r}; it must be a whole number, at least {minimum}"
                )
        for name in ("every_minutes", "keep_hours"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ConfigError(f"checkpoint.{name} is {value!r}; it must be a finite number, at least 0")
        if type(self.local_dir) is not str or (self.local_every and not self.local_dir):
            raise ConfigError(
                f"checkpoint.local_dir is {self.local_dir!r}; it must be a directory on each host where "
                f"checkpoint.local_every is {self.local_every}"
            )
        if type(self.asynchronous) is not bool:
            raise ConfigError(f"checkpoint.asynchronous is {self.asynchronous!r}; it must be true or false")
