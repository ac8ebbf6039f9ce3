"""TPU chips: clock, peak FLOP/s, memory, links, and how fast attention kernels are on them.

Sources:
  clock, and links: the scaling book, https://jax-ml.github.io/scaling-book/tpus; of tpu7x, which is not in
    it, the links are v5p's, whose nominal 1,200 GB/s a chip they share, and the clock is peak FLOP/s over
    those of a cycle.
  peak FLOP/s, in eight bits too, HBM bandwidth and data-center network: Cloud TPU's pages, such as
    https://docs.cloud.google.com/tpu/docs/tpu7x; of v4, the network of v5p.
  HBM that a program may use: what the compiler (libtpu 0.0.52) reports when a program needs more.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of TPU. Bytes and FLOPs are those of a whole chip.

    Attributes:
      clock_hz: of the matrix units; cycles over it are seconds.
      peak_flops: bf16 FLOP/s, all cores.
      hbm_bytes: that a program may use.
      hbm_bandwidth: bytes/s.
      link_bytes: bytes/s of one side's links, both directions together: what an all-gather over a ring gets.
      dcn_bytes: bytes/s of the data-center network in one direction.
      sides: dimensions of a slice.
      names_count: what the N of a slice name such as v5p-N counts a chip as.
      devices: of JAX.
      int8_speed: FLOP/s of products in int8, over peak; 1 where the pages give none.
      fp8_speed: of products in fp8; 0 for a chip without units for it.
      kernel_share: FLOP/s of attention kernels over peak; masked tiles are not counted.
      kernel_source: where the share was measured; empty if it is assumed.
    """

    clock_hz: float
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bytes: float
    dcn_bytes: float
    sides: int
    names_count: int
    devices: int = 1
    int8_speed: float = 2.0
    fp8_speed: float = 0.0
    kernel_share: float = 0.5
    kernel_source: str = ""


# Llama 3.1 8B at 65,536 tokens, head size 128: 53.0% MFU with causal attention counted half, which is 1.82e11
# FLOPs of peak a token. Products, nearly all run again in the backward pass, are 5.5e10: 6.1e10 at the 90%
# that the compiler gives them, and elementwise passes 1e10. Kernels (a fused backward one) are 6e10.
_MAXTEXT_4687 = "from AI-Hypercomputer/maxtext pull request 4687: v5p-128, 65,536 tokens, 53.0% MFU"

CHIPS = {
    "v4": Chip(1.05e9, 275e12, 30.75 * GIB, 1.2e12, 9e10, 6.25e9, 3, 2, int8_speed=1.0),
    "v5e": Chip(1.5e9, 197e12, 15.75 * GIB, 8.19e11, 9e10, 3.125e9, 2, 1),
    "v5p": Chip(
        1.75e9,
        459e12,
        95.73 * GIB,
        2.765e12,
        1.8e11,
        6.25e9,
        3,
        2,
        kernel_share=0.54,
        kernel_source=_MAXTEXT_4687,
    ),
    "v6e": Chip(1.75e9, 918e12, 31.24 * GIB, 1.638e12, 1.8e11, 1.25e10, 2, 1),
    "tpu7x": Chip(
        2.2e9,
        2307e12,
        2 * 94.74 * GIB,
        7.38e12,
        1.8e11,
        1.25e10,
        3,
        2,
        devices=2,
        int8_speed=1.0,
        fp8_speed=2.0,
    ),
}

# What JAX calls a TPU: a chip of `CHIPS` by the prefix of `device_kind`; the first that fits.
TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
