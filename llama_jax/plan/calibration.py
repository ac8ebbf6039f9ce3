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


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a kind of chip reaches.

    Attributes:
      products: share of peak of matrix products, by whether the scoped VMEM limit is raised.
      elementwise: share of HBM bandwidth of passes over activations and state, likewise.
      dequantized: weights/s that are turned from NF4 into the compute dtype, a bound of the vector units.
      quantized: numbers/s that are quantized to eight bits, with what belongs to it.
      eight_bits: what products in eight bits keep of that share, of a peak that is twice as high.
      overlaps: whether collectives run beside products, by the flags of `ops.compiler_flags`.
    """

    products: tuple[float, float]
    elementwise: tuple[float, float]
    dequantized: float
    quantized: float
    eight_bits: float
    overlaps: bool = True


# Of v4 and tpu7x nothing was compiled: shares are v5p's. In eight bits 7B was compiled for v5e:4x4 and, as it
# was before weight gradients had their operands transposed, v6e:4x4; v5p's are v5e's, by memory and clock.
_CALIBRATIONS = {
    "v4": Calibration((0.89, 0.97), (0.4, 0.5), 1.1e11, 1.2e11, 0.97, overlaps=False),
    "v5p": Calibration((0.89, 0.97), (0.4, 0.5), 1.8e11, 2.8e11, 0.97),
    "v5e": Calibration((0.83, 0.90), (0.6, 0.7), 8e10, 8.5e10, 0.97),
    "v6e": Calibration((0.68, 0.75), (0.75, 0.75), 9e10, 1.5e11, 0.6),
    "tpu7x": Calibration((0.89, 0.97), (0.4, 0.5), 4.5e11, 7e11, 0.97),
}


def calibration(kind: str) -> Calibration:
    """The constants of a kind of chip.

    Raises:
      ConfigError: for one that nobody has measured.
    """
    if kind not in _CALIBRATIONS:
        raise ConfigError(f"there are no constants for chip {kind!r}; plan for {', '.join(_CALIBRATIONS)}")
    return _CALIBRATIONS[kind]
