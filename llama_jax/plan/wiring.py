"""How long a collective keeps links busy: the sides of the torus that its devices span.

Times are those of the scaling book (https://jax-ml.github.io/scaling-book/sharding, "Computing with sharded
arrays"): bytes over the bandwidth of all sides that a group spans, or a microsecond for each hop if that is
longer. A group that closes a whole side has both directions of its ring; any other is a chain, with one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from llama_jax.plan.chips import CHIPS
from llama_jax.plan.collectives import Collective, Groups
from llama_jax.plan.topology import Topology

HOP_SECONDS = 1e-6
DCN, DIE = -1, -2
"""Links that are no side of the torus: the data-center network, and between the two devices of a chip."""
_DIE_SIDES = 6  # a chip's two dies are joined by six times the bandwidth of a link (Cloud TPU, "TPU7x")


@dataclasses.dataclass(frozen=True)
class Use:
    """The links that a collective keeps busy.

    Attributes:
      sides: numbers of the torus's sides, `DCN` or `DIE`; others are free for other collectives.
      seconds: for which they are busy.
    """

    sides: frozenset[int]
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Span:
    """A group of devices on the torus: side -> (chips, distance between neighbours, whether it is a ring)."""

    sides: dict[int, tuple[int, int, bool]]
    chips: int
    devices_per_chip: int
    slices: int


class Wiring:
    """The links between the devices of a mesh.

    Attributes:
      topology: the slices.
      places: int [devices, 1 + sides + 1], in the mesh's order: slice, coordinates, place on the chip.
    """

    def __init__(self, topology: Topology, places: Sequence[Sequence[int]]) -> None:
        self.topology = topology
        self.chip = CHIPS[topology.kind]
        self.places = np.asarray(places)
        self._span = functools.cache(self._span_of)

    def use(self, one: Collective) -> Use:
        """The links that one execution of a collective keeps busy."""
        if one.pairs:
            return self._permute(one.bytes, one.pairs)
        span = self._span(one.groups or (tuple(range(len(self.places))),))
        if span.slices > 1:
            return self.between_slices(one.bytes)
        if not span.sides:
            bandwidth = _DIE_SIDES * self.chip.link_bytes
            return Use(frozenset([DIE]) if span.devices_per_chip > 1 else frozenset(), one.bytes / bandwidth)
        hops = sum(
            (chips // 2 if ring else chips - 1) * stride for chips, stride, ring in span.sides.values()
        )
        # Devices of one chip that are in different groups share its links.
        sharing = self.chip.devices / span.devices_per_chip
        if one.kind == "all-to-all":
            bandwidths = self._bandwidths(span)
            seconds = sharing * max(
                one.bytes * chips / (4 * bandwidths[side]) for side, (chips, _, _) in span.sides.items()
            )
        else:
            seconds = (
                sharing * one.bytes * (span.chips - 1) / span.chips / sum(self._bandwidths(span).values())
            )
        seconds = max(seconds, hops * HOP_SECONDS)
        return Use(frozenset(span.sides), seconds * (2 if one.kind == "all-reduce" else 1))

    def between_slices(self, size: float) -> Use:
        """The data-center network, for bytes that each device sends to other slices."""
        slices = self.topology.slices
        each = size * 2 * (slices - 1) / slices * self.chip.devices
        return Use(frozenset([DCN]), each / self.chip.dcn_bytes)

    def _bandwidths(self, span: _Span) -> dict[int, float]:
        """Bytes/s that a chip of a group receives along each side."""
        return {
            side: self.chip.link_bytes * (1.0 if ring else 0.5) / stride
            for side, (_, stride, ring) in span.sides.items()
        }

    def _span_of(self, groups: Groups) -> _Span:
        members = self.places[list(groups[0])]
        sides = {}
        for side, (length, closed) in enumerate(zip(self.topology.sides, self.topology.rings, strict=True)):
            values = sorted({int(value) for value in members[:, 1 + side]})
            if len(values) > 1:
                stride = functools.reduce(math.gcd, (b - a for a, b in itertools.pairwise(values)))
                sides[side] = len(values), stride, closed and len(values) * stride == length
        chips = len({tuple(row) for row in members[:, :-1]})
        return _Span(sides, chips, max(len(members) // chips, 1), len({int(row[0]) for row in members}))

    def _permute(self, size: float, pairs: Groups) -> Use:
        """Each device sends to another: the time of the link that most of it crosses."""
        loads: Counter[tuple[int, ...]] = Counter()
        sides, longest = set(), 0
        for source, target in pairs:
            here, there = self.places[source].copy(), self.places[target]
            if here[0] != there[0]:
                return self.between_slices(size)
            hops = 0
            for side, (length, closed) in enumerate(
                zip(self.topology.sides, self.topology.rings, strict=True)
            ):
                distance = int(there[1 + side] - here[1 + side])
                if closed and abs(distance) > length / 2:
                    distance -= int(math.copysign(length, distance))
                step = (distance > 0) - (distance < 0)
                for _ in range(abs(distance)):
                    loads[(side, step, *map(int, here[:-1]))] += 1
                    here[1 + side] = (here[1 + side] + step) % length
                if distance:
                    sides.add(side)
                hops += abs(distance)
            longest = max(longest, hops)
        if not sides:
            return Use(frozenset([DIE]), size / (_DIE_SIDES * self.chip.link_bytes / 2))
        seconds = max(loads.values()) * size / (self.chip.link_bytes / 2)
        return Use(frozenset(sides), max(seconds, longest * HOP_SECONDS))
