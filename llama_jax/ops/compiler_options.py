"""XLA options of single programs, by platform."""

from __future__ import annotations


def decode_options(platform: str) -> dict[str, int] | None:
    """The `compiler_options` of the decoding program.

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1): it prefers 256-bit vectors where the processor has
    512, and reads weights from memory more slowly: a tenth in f32 with batch size 1.
    """
    return {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" else None
