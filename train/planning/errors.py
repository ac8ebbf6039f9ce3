"""Why a step was not compiled."""

from __future__ import annotations

from llama_jax.errors import InputError


class CompilerMissing(InputError):
    """There is no TPU compiler on this machine."""


class OutOfMemory(InputError):
    """The step needs more memory than a chip has.

    Attributes:
      needed: bytes; 0 if the compiler does not say, since it gave up on temporaries alone.
      capacity: bytes that a program may use.
    """

    def __init__(self, message: str, *, needed: float = 0.0, capacity: float = 0.0) -> None:
        super().__init__(message)
        self.needed = needed
        self.capacity = capacity
