"""Arrays of whole numbers as callers give them: JAX and numpy arrays, tracers, and nested lists."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.errors import InputError


def as_array(name: str, value: Any) -> Any:
    """Returns arrays, tracers and None unchanged, and a (nested) list as an array.

    Args:
      name: the argument's name, for the error.
      value: any array; or a list of numbers, of lists, or of arrays of equal shape.

    Raises:
      InputError: for rows of different lengths, integers beyond int32, or anything else that is no array.
    """
    if value is None or hasattr(value, "dtype"):
        return value
    try:
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value)):
            return jnp.asarray(value)
        array = np.asarray(value)
    except (ValueError, TypeError):
        array = np.asarray(None)
    if array.dtype.kind in "iu" and array.size:
        if abs(extreme := max(array.min(), array.max(), key=abs)) < 1 << 31:
            return array.astype(np.int32)
        raise InputError(f"{name} contains {extreme}, beyond any vocabulary; ids are below 2^31")
    if array.dtype.kind in "bf" or not array.size:
        return array
    if isinstance(value, (list, tuple)) and len({np.size(row) for row in _rows(value)}) > 1:
        raise InputError(
            f"{name} has rows of different lengths; pad them on the right to one length, with any id"
        )
    raise InputError(f"{name} is {str(value)[:60]!r}; it must be an array, or a list, of whole numbers")


def _rows(value: Any) -> list[Any]:
    return [row for row in value if isinstance(row, (list, tuple, np.ndarray))]
