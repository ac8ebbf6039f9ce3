"""Casts between floating-point dtypes, rounding to nearest, with an error on overflow."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_jax.errors import CheckpointError


def cast(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Casts to another floating-point dtype, rounding to nearest, ties to even; no copy for the same dtype.

    Raises:
      CheckpointError: if a finite value is too large for float16.
    """
    with np.errstate(over="ignore"):
        out = array.astype(dtype, copy=False)
    if out.dtype == np.float16 and array.dtype != np.float16 and np.isinf(out).any():
        overflow = np.isinf(out) & np.isfinite(array)
        if overflow.any():
            value = float(array.reshape(-1)[overflow.argmax()])
            raise CheckpointError(f"the value {value:g} is too large for float16; use bfloat16 or float32")
    return out
