"""TPU slices by name: their chips, how they are wired, and their devices as the compiler knows them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import ConfigError, InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU. Numbers: the scaling book, https://jax-ml.github.io/scaling-book/tpus.

    Attributes:
      clock_hz: of the matrix units; cycles over it are seconds.
      peak_flops: bf16 FLOP/s a chip, all cores.
      link_bytes: bytes/s of one axis of links, both directions together.
      sides: dimensions of a slice.
      names_count: what the N of a slice name such as v5p-N counts a chip as.
    """

    clock_hz: float
    peak_flops: float
    link_bytes: float
    sides: int
    names_count: int


CHIPS = {
    "v4": Chip(1.05e9, 275e12, 9e10, 3, 2),
    "v5p": Chip(1.75e9, 459e12, 1.8e11, 3, 2),
    "v5e": Chip(1.5e9, 197e12, 9e10, 2, 1),
    "v6e": Chip(1.75e9, 918e12, 1.8e11, 2, 1),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: the kind of chip and how many stand along each side."""

    kind: str
    sides: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.sides))}"

    @property
    def wraps(self) -> bool:
        """Whether links close to rings: in v5p slices whose sides are all multiples of 4."""
        return self.kind == "v5p" and all(side % 4 == 0 for side in self.sides)

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads `v5p:4x4x4`, or a slice's name such as `v5p-128` (of 128 cores, which are 64 chips).

        Raises:
          ConfigError: for anything else.
        """
        if match := re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text):
            sides = tuple(map(int, match[2].split("x")))
            if 0 not in sides:
                return cls(match[1], sides)
        elif match := re.fullmatch(r"(\w+)-(\d+)", text):
            kind = "v5e" if match[1] == "v5litepod" else match[1]
            if chip := CHIPS.get(kind):
                chips, rest = divmod(int(match[2]), chip.names_count)
                if not rest and chips and not chips & (chips - 1):
                    return cls(kind, _square(chips, chip.sides))
        raise ConfigError(
            f"topology {text!r} is not KIND:SIDES, as in v5p:4x4x4, or a slice's name, as in v5p-128 "
            f"(of {', '.join(CHIPS)}; a power of two)"
        )

    def devices(self) -> Any:
        """The slice's devices, which can be compiled for and not run on.

        Raises:
          InputError: without libtpu, or if it knows no such slice.
        """
        from jax.experimental import topologies

        wiring: dict[str, Any] = {}
        if self.wraps:
            # Left out, the compiler takes the links for open chains, and gathers by adding zeros.
            wiring = {
                "chip_config_name": "megacore",
                "chips_per_host_bounds": (2, 2, 1),
                "num_slices": 1,
                "wrap": (True, True, True),
            }
        try:
            with _quiet():
                return topologies.get_topology_desc(platform="tpu", topology_name=self.name, **wiring).devices
        except Exception as error:  # whatever libtpu raises; its absence is a RuntimeError
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"topology {self.name} cannot be compiled for: {line[:200]}; install libtpu "
                "(`pip install libtpu`), and give a slice that exists"
            ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops native stderr output: libtpu warns on every host without a TPU."""
    sys.stderr.flush()
    saved_stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(saved_stderr, 2)
        os.close(saved_stderr)
        os.close(devnull)


def _square(count: int, sides: int) -> tuple[int, ...]:
    """A power of two as a product of `sides` powers of two, as equal as possible, ones last."""
    exponent = count.bit_length() - 1
    powers = [2 ** ((exponent + place) // sides) for place in range(sides)]
    return tuple(sorted(powers, key=lambda power: (power == 1, power)))
