"""Exchanges bytes between the processes of a run."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

_LEAST_BYTES = 1 << 12


def gather_bytes(data: bytes) -> list[bytes]:
    """Returns the bytes of every process, in the order of the processes; all of them must call it.

    They travel in buffers of a power of two bytes: few programs are compiled.
    """
    if jax.process_count() == 1:
        return [data]
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(data))))
    buffer = np.zeros(max(_LEAST_BYTES, 1 << (int(sizes.max()) - 1).bit_length()), np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(buffer)
    return [row[:size].tobytes() for row, size in zip(rows, sizes.tolist(), strict=True)]
