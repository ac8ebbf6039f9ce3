"""How the axes of a mesh lie on the links of a slice, by arithmetic: bandwidth for a collective on each."""

from __future__ import annotations

import math
from collections.abc import Mapping

from llama_jax.plan.chips import CHIPS
from llama_jax.plan.topology import Topology

# Innermost first: these collectives stand in the way of every product.
_ORDER = ("tensor", "context", "expert", "data", "fsdp")


def axis_bandwidth(topology: Topology, mesh: Mapping[str, int]) -> dict[str, float]:
    """Bytes/s that a device receives in a collective over each axis, within a slice.

    An axis gets whole sides of the torus where some multiply to its size, and else a part of a side, which is
    an open chain: half of a ring's bandwidth. The devices of a chip share its links.
    """
    chip, ring = CHIPS[topology.kind], topology.rings
    left = list(topology.sides)
    bandwidth = {}
    for axis in _ORDER:
        size = mesh.get(axis, 1) // (topology.slices if axis == "data" else 1)
        if size <= 1:
            bandwidth[axis] = chip.link_bytes  # never used
            continue
        total = 0.0
        for place in sorted(range(len(left)), key=lambda p: (size % left[p] != 0, left[p])):
            whole, taken = left[place], math.gcd(size, left[place])
            if taken > 1:
                is_ring = ring[place] and taken == whole == topology.sides[place]
                total += chip.link_bytes * (1.0 if is_ring else 0.5)
                left[place], size = whole // taken, size // taken
        bandwidth[axis] = (total or chip.link_bytes / 2) / chip.devices
    return bandwidth
