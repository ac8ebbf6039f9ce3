"""Constants of the arithmetic, by chip: few, named, and each with how it was measured.

Measured on the steps of configs/ as the TPU compiler compiles them (libtpu 0.0.52, JAX 0.12.0.1), by
`tests/plan/compiled.json`: shares are floating-point operations or bytes over the compiler's cycles for them,
at the chip's clock.
"""

from __future__ import annotations

import dataclasses

from llama_jax.errors import ConfigError

# What is left of the share of peak of products where weights have an adapter: XLA then fuses SiLU into
# them. Of 70B by LoRA, v5p 2x2x4.
ADAPTED = 0.86
# The same of products in eight bits, whose results are multiplied by scales as they leave the matrix units.
# Of 7B in int8, v6e 4x4 (0.60) and v5e 4x4.
EIGHT_BITS = 0.6


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a kind of chip reaches.

    Attributes:
      products: share of peak of matrix products, by whether the scoped VMEM limit is raised.
      elementwise: share of HBM bandwidth of passes over activations and state, likewise.
      dequantized: weights/s that are turned from NF4 into the compute dtype, a bound of the vector units.
      quantized: numbers/s that are quantized to eight bits, with what belongs to it, a bound of the vector
        units.
      overlaps: whether collectives run beside products, by the flags of `ops.compiler_flags`.
    """

    products: tuple[float, float]
    elementwise: tuple[float, float]
    dequantized: float
    quantized: float
    overlaps: bool = True


# Of v4 and tpu7x nothing was compiled: shares are v5p's.
_CALIBRATIONS = {
    "v4": Calibration((0.89, 0.97), (0.4, 0.5), 1.1e11, 1e11, overlaps=False),
    "v5p": Calibration((0.89, 0.97), (0.4, 0.5), 1.8e11, 1.5e11),
    "v5e": Calibration((0.83, 0.90), (0.6, 0.7), 8e10, 1.3e11),
    "v6e": Calibration((0.68, 0.75), (0.75, 0.75), 9e10, 1.5e11),
    "tpu7x": Calibration((0.89, 0.97), (0.4, 0.5), 4.5e11, 3e11),
}


def calibration(kind: str) -> Calibration:
    """The constants of a kind of chip.

    Raises:
      ConfigError: for one that nobody has measured.
    """
    if kind not in _CALIBRATIONS:
        raise ConfigError(f"there are no constants for chip {kind!r}; plan for {', '.join(_CALIBRATIONS)}")
    return _CALIBRATIONS[kind]
