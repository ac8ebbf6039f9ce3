"""Compiles a program as XLA does it for a user, for tests that look at what XLA made of it."""

from __future__ import annotations

import jax


def optimized(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The compiled program, with the HLO that a user's would have.

    `conftest.py` turns XLA:CPU's fusion emitters off, which changes how programs are fused.
    """
    if jax.__version_info__ >= (0, 11):
        return lowered.compile()  # has no other emitters
    return lowered.compile(compiler_options={"xla_cpu_use_fusion_emitters": True})
