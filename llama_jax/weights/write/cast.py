"""Casts between floating-point types, each value to the nearest, with no finite one becoming infinite."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama_jax.errors import CheckpointError


def cast(array: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """`array` in another floating-point dtype, rounded to nearest, ties to even; itself if it is in that.

    Raises:
      CheckpointError: if a finite value is too large for float16.
    """
    with np.errstate(over="ignore"):
        out = array.astype(dtype, copy=False)
    if out.dtype == np.float16 and array.dtype != np.float16 and np.isinf(out).any():
        lost = np.isinf(out) & np.isfinite(array)
        if lost.any():
            value = float(array.reshape(-1)[lost.argmax()])
            raise CheckpointError(f"the value {value:g} is too large for float16; use bfloat16 or float32")
    return out
