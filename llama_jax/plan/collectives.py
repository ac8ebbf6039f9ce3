"""The collectives of a compiled program: bytes, devices, and whether computation runs beside them.

A collective may stand in the program as an instruction of its own, inside a fusion, or in a computation that
SparseCore runs, between its start and its end.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from llama_jax.plan.hlo import ITEM_BYTES, Instruction, Module, blocks

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Groups = tuple[tuple[int, ...], ...]
# Axes with their sizes, possibly an order of the devices, and the axes within a group.
_MESH_GROUPS = (
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]*\](?:T\([\d,]*\))?)\))?\s*\{([^}]*)\}"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
      kind: one of `COLLECTIVES`.
      dtype: of the data.
      bytes: of the full array on one device: the result of an all-gather, the operand of the others.
      group: number of devices in the replica group; None if the text lists pairs.
      times: how often a step runs it.
      overlapped: whether it is asynchronous, with computation between start and end.
      name: of the instruction.
      groups: the devices of each replica group, by their positions in the mesh.
      pairs: source and target of each send of a collective-permute, by the same positions.
    """

    kind: str
    dtype: str
    bytes: int
    group: int | None
    times: int
    overlapped: bool
    name: str = ""
    groups: Groups = ()
    pairs: Groups = ()

    @property
    def moved(self) -> int:
        """Minimum number of bytes that each device receives in a step."""
        share = 1.0 if self.group is None else (self.group - 1) / self.group
        return int(self.bytes * self.times * share * (2 if self.kind == "all-reduce" else 1))


def find(module: Module) -> list[Collective]:
    """Every executed collective."""
    found = []
    for instructions, times in blocks(module):
        for place, instruction in enumerate(instructions):
            for one in _inside(module, instruction):
                kind = one.opcode.removesuffix("-start")
                # The TPU compiler writes some reduce-scatters as an all-reduce fused with the slice of it.
                called = instruction.called("calls")
                if kind == "all-reduce" and any("all-reduce-scatter" in name for name in called):
                    kind = "reduce-scatter"
                dtype, size = _data(one)
                groups = replica_groups(one.rest)
                group = len(groups[0]) if groups else None
                overlapped = _overlapped(instructions, place)
                name, pairs = instruction.name, source_target_pairs(one.rest)
                found.append(
                    Collective(kind, dtype, size, group, times, overlapped, name, groups or (), pairs)
                )
    return found


def _inside(module: Module, instruction: Instruction) -> list[Instruction]:
    """The collectives of an instruction: itself, or those of what it calls."""
    if instruction.opcode.removesuffix("-start") in COLLECTIVES:
        return [instruction]
    if instruction.opcode != "fusion" and not instruction.opcode.endswith("-start"):
        return []
    names = [
        name
        for attribute in ("calls", "to_apply", "called_computations")
        for name in instruction.called(attribute)
    ]
    return [one for name in names for one in module.computations[name] if one.opcode in COLLECTIVES]


def _overlapped(instructions: Sequence[Instruction], place: int) -> bool:
    """Whether an instruction's collective runs beside computation.

    The start of an asynchronous operation is used by its end, or by an update, which is where SparseCore gets
    its operands.
    """
    first = instructions[place]
    if not first.opcode.endswith("-start"):
        return "async" in first.name
    name, busy = first.name, False
    for one in instructions[place + 1 :]:
        if re.match(rf"\(*%{re.escape(name)}[,)]", one.rest):
            if one.opcode.endswith("-done"):
                return busy
            if one.opcode.endswith("-update"):
                name, busy = one.name, False
        busy |= _computes(one)
    return False


def _computes(instruction: Instruction) -> bool:
    return bool(instruction.cycles) or instruction.opcode in ("while", "call", "conditional", "custom-call")


def _data(instruction: Instruction) -> tuple[str, int]:
    """The dtype and the bytes of a collective.

    Several arrays in one instruction are combined collectives. The start of an asynchronous one also lists
    its operands; its result is the largest array.
    """
    sizes = [(math.prod(dims) * ITEM_BYTES.get(dtype, 1), dtype) for dtype, dims in instruction.arrays]
    size, dtype = max(sizes, default=(0, "?"))
    if not instruction.opcode.endswith("-start"):
        size = sum(each for each, _ in sizes)
    if instruction.opcode == "reduce-scatter" and (groups := replica_groups(instruction.rest)):
        size *= len(groups[0])
    return dtype, int(size)


def replica_groups(attributes: str) -> Groups | None:
    """The devices of each group, in any of XLA's notations; None where there are none, or only pairs."""
    if mesh := re.search(_MESH_GROUPS, attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
        inside = re.findall(r"'(\w+)'", mesh[3])
        order = [name for name in sizes if name not in inside] + inside
        grid = ids.reshape(tuple(sizes.values())).transpose([list(sizes).index(name) for name in order])
        return _rows(grid.reshape(-1, math.prod(sizes[name] for name in inside)))
    if listed := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _rows(_iota(listed[2]).reshape(tuple(map(int, listed[1].split(",")))))
    if listed := re.search(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", attributes):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    return None


def source_target_pairs(attributes: str) -> Groups:
    """The pairs of a collective-permute."""
    found = re.search(r"source_target_pairs=\{(\{\d+,\d+\}(?:,\{\d+,\d+\})*)\}", attributes)
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found[1])) if found else ()


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)`: the numbers from 0 on in an array of this shape, transposed; flat."""
    dims, _, order = text.partition("T")
    shape = tuple(map(int, re.findall(r"\d+", dims)))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return (numbers.transpose([*map(int, re.findall(r"\d+", order))]) if order else numbers).reshape(-1)


def _rows(array: np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in array)


def mesh_axes(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh, of these sizes by name, along which the devices of a group differ."""
    places = np.array(np.unravel_index(np.array(groups), tuple(mesh.values())))  # [axes, groups, members]
    differ = (places != places[:, :, :1]).any((1, 2))
    return tuple(name for name, spans in zip(mesh, differ, strict=True) if spans)


def with_gathers(found: Sequence[Collective], mesh: Mapping[str, int], dtype: str) -> list[Collective]:
    """Collectives as on several real slices.

    The compiler takes the links of several slices for open chains, and gathers weights by adding zero-filled
    arrays; on the real ones it gathers, and receives half of that.

    Args:
      found: of a program for several slices.
      mesh: sizes by axis name.
      dtype: in which weights are gathered, such as `bf16`.
    """

    def gathers(one: Collective) -> bool:
        alike = one.kind == "all-reduce" and one.dtype == dtype
        return alike and bool(one.groups) and mesh_axes(one.groups, mesh) == ("fsdp",)

    return [dataclasses.replace(one, kind="all-gather") if gathers(one) else one for one in found]


def summed(found: list[Collective]) -> list[Collective]:
    """Merges collectives alike but for name, groups and pairs, and adds their `times`; most bytes first."""
    times: dict[Collective, int] = collections.Counter()
    for one in found:
        times[dataclasses.replace(one, times=0, name="", groups=(), pairs=())] += one.times
    alike = [dataclasses.replace(one, times=count) for one, count in times.items()]
    return sorted(alike, key=lambda one: -one.bytes * one.times)


def asynchronous_share(found: Iterator[Collective] | Sequence[Collective]) -> float:
    """The share of the bytes of all-gathers and reduce-scatters that runs beside computation; 1 if none."""
    moved = [(one.moved, one.overlapped) for one in found if one.kind in ("all-gather", "reduce-scatter")]
    total = sum(size for size, _ in moved)
    return sum(size for size, overlapped in moved if overlapped) / total if total else 1.0


def sends_between_slices(module: Module) -> list[tuple[str, int, int]]:
    """(instruction, bytes, times) of what each device hands to the data-center network for other slices.

    The TPU compiler splits a collective between slices into one within the slice and a send to the network's
    runtime, which sums or concatenates what the slices send.
    """
    return [
        (one.name, _data(dataclasses.replace(one, opcode="send-start"))[1], times)
        for instructions, times in blocks(module)
        for one in instructions
        if one.opcode == "send" and "xla_megascale_runtime" in one.rest
    ]


def sent_between_slices(module: Module) -> int:
    """The bytes that each device hands to the data-center network in a step, for other slices."""
    return sum(size * times for _, size, times in sends_between_slices(module))
