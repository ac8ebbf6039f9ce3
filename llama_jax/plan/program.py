"""A compiled step as text: what it computes, what it sends, and what computation waits for."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.plan import collectives, hlo, parts, schedule
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.collectives import Collective
from llama_jax.plan.parts import Operation, Shapes
from llama_jax.plan.result import Traffic
from llama_jax.plan.topology import Topology
from llama_jax.plan.wiring import Use, Wiring

# Seconds, assumed: starting a step's program, and a loop's iteration (docs/planning_arithmetic.md).
STEP_LAUNCH, LOOP_LAUNCH = 1e-3, 5e-6


@dataclasses.dataclass(frozen=True)
class Program:
    """What a step's program costs, on one device except for `traffic`, which is a chip's.

    Attributes:
      module: the program.
      collectives: in the order of the program.
      operations: that compute.
      traffic: collectives by kind, axes and network; most waited for first.
      launch_seconds: of starting the program and the iterations of its loops.
    """

    module: hlo.Module
    collectives: list[Collective]
    operations: list[Operation]
    traffic: tuple[Traffic, ...]
    launch_seconds: float


def read_program(
    text: str,
    mesh: Mapping[str, int],
    places: Sequence[Sequence[int]],
    topology: Topology,
    shapes: Shapes,
    gathered: str = "bf16",
) -> Program:
    """Reads a program that the TPU compiler has scheduled.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      mesh: sizes of its axes, outermost first.
      places: of the mesh's devices in order, as `plan.wiring.Wiring` takes them.
      topology: the slices.
      shapes: of the model's products.
      gathered: HLO's name of the dtype in which weights are gathered, which several slices need.
    """
    module = hlo.parse(text)
    found = collectives.find(module)
    if topology.slices > 1:
        found = collectives.with_gathers(found, mesh, gathered)
    balanced = any(one.pairs and "context" in _axes(one, mesh) for one in found)
    computed = parts.operations(module, shapes, CHIPS[topology.kind], balanced=balanced)
    loops = sum(
        times * hlo.trip_count(module, one) for one, times in hlo.executed(module) if one.opcode == "while"
    )
    return Program(
        module=module,
        collectives=found,
        operations=computed,
        traffic=_traffic(module, found, computed, mesh, places, topology),
        launch_seconds=STEP_LAUNCH + LOOP_LAUNCH * loops,
    )


def _axes(one: Collective, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that a collective crosses; all if the program does not say."""
    groups = one.pairs or one.groups
    return collectives.mesh_axes(groups, mesh) if groups else tuple(n for n, size in mesh.items() if size > 1)


def _traffic(
    module: hlo.Module,
    found: list[Collective],
    computed: list[Operation],
    mesh: Mapping[str, int],
    places: Sequence[Sequence[int]],
    topology: Topology,
) -> tuple[Traffic, ...]:
    chip = CHIPS[topology.kind]
    wiring = Wiring(topology, places)
    named = {(one.name, place): one for place, one in enumerate(found)}
    uses: dict[str, list[Use]] = defaultdict(list)
    for one in named.values():
        uses[one.name].append(wiring.use(one))
    sends = collectives.sends_between_slices(module)
    uses |= {name: [wiring.between_slices(size)] for name, size, _ in sends}
    seconds = {one.instruction.name: one.seconds for one in computed}
    _, waits = schedule.simulate(module, seconds, uses)
    totals: dict[tuple[str, str, Any], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for (name, _), one in named.items():
        use = wiring.use(one)
        whole = sum(each.seconds for each in uses[name])
        share = use.seconds / whole if whole else 0.0
        network = "dcn" if -1 in use.sides else "ici"
        total = totals[one.kind, ",".join(_axes(one, mesh)), network]
        wait = waits.get(name, schedule.Wait())
        amounts = (one.moved * chip.devices, share * wait.busy, share * wait.exposed)
        total[:] = [a + b for a, b in zip(total, amounts, strict=True)]
    for name, size, times in sends:
        total = totals["send", "data", "dcn"]
        wait = waits.get(name, schedule.Wait())
        amounts = (size * times * chip.devices, wait.busy, wait.exposed)
        total[:] = [a + b for a, b in zip(total, amounts, strict=True)]
    rows = [Traffic(kind, axes, network, *total) for (kind, axes, network), total in totals.items()]
    return tuple(sorted(rows, key=lambda row: (-row.exposed_seconds, -row.seconds)))
