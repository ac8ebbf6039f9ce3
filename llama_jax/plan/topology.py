"""TPU slices by name: their chips, how they are wired, and their devices as the compiler knows them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from llama_jax.errors import ConfigError, InputError
from llama_jax.ops.compiler_flags import LIBTPU_FLAGS, with_flags
from llama_jax.plan.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices: the kind of chip, how many stand along each side of one, and how many slices there are."""

    kind: str
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        one = f"{self.kind}:{'x'.join(map(str, self.sides))}"
        return one if self.slices == 1 else f"{self.slices} x {one}"

    @property
    def chips(self) -> int:
        """Of all slices."""
        return self.slices * math.prod(self.sides)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Whether the links of each side close to a ring.

        Where a slice has three dimensions, optical switches close all of them if it consists of whole cubes
        of 4 x 4 x 4; where it has two, the sides of a full pod, 16, are closed (the scaling book, "TPU
        networking").
        """
        if len(self.sides) < 3:
            return tuple(side == 16 for side in self.sides)
        return (all(side % 4 == 0 for side in self.sides),) * len(self.sides)

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

        libtpu is loaded with the flags that a training run on such a slice sets. It reads them once: one
        process compiles for one generation of TPU.

        Raises:
          InputError: without libtpu, or if it knows no such slice.
        """
        from jax.experimental import topologies

        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = with_flags(given, LIBTPU_FLAGS.get(self.kind, {}))
        wiring: dict[str, Any] = {} if self.slices == 1 else {"num_slices": self.slices}
        if any(self.rings):
            # Left out, the compiler takes the links for open chains, and gathers by adding zeros.
            wiring["wrap"] = (*self.rings, False, False)[:3]
        if self.kind == "v4":  # otherwise each of its two cores is a device
            wiring["chip_config_name"] = "megacore"
        try:
            with _quiet():
                name = dataclasses.replace(self, slices=1).name
                return topologies.get_topology_desc(platform="tpu", topology_name=name, **wiring).devices
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
