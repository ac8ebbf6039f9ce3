"""Parses a compiled TPU program for its cost: cycles, shapes, donation.

The TPU compiler annotates each fusion with an estimate of its cycles. XLA's cost analysis counts a loop's
body once; here every computation is multiplied by its trip count.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

ITEM_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2} | {
    f"{kind}{bits}": bits // 8 for kind in "suf" for bits in (8, 16, 32, 64)
}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_UNKNOWN_CYCLES = 2**62  # the compiler writes 2^63 - 1 if it has no estimate


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name in the text.
      shape: its result's type as text; a tuple is in parentheses.
      opcode: such as `fusion` or `all-gather-start`.
      rest: operands and attributes as text.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def arrays(self) -> list[tuple[str, tuple[int, ...]]]:
        """(dtype, dimensions) of each array of the result."""
        return arrays(self.shape)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate, or None."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found and int(found[1]) < _UNKNOWN_CYCLES else None

    def called(self, attribute: str) -> list[str]:
        """The computations in an attribute such as `body` or `branch_computations`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.-]+)", self.rest)
        return re.findall(r"[\w.-]+", found[1]) if found else []


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      header: the first line.
      entry: the name of the entry computation.
      computations: computation name to instructions.
    """

    header: str
    entry: str
    computations: dict[str, list[Instruction]]


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`.

    An attribute may span several lines, which may start with anything, even a closing brace: a computation
    ends where the next one starts.
    """
    lines = text.splitlines()
    entry, computations = "", dict[str, list[Instruction]]()
    current: list[Instruction] = []
    for line in lines[1:]:
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif start := _INSTRUCTION.match(line):
            shape, rest = _split_shape(line[start.end() :])
            opcode, _, rest = rest.partition("(")
            current.append(Instruction(start[1], shape, opcode.strip(), rest))
        elif current and line and (line[0] != "}" or line.startswith("}}")):
            current[-1] = dataclasses.replace(current[-1], rest=f"{current[-1].rest}\n{line}")
    return Module(lines[0] if lines else "", entry, computations)


def _split_shape(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    return text, ""


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of every array type in a text."""
    return [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(text)]


def trip_count(module: Module, loop: Instruction) -> int:
    """The trip count of a `while`: the compiler's annotation, or the constant in its condition over the step.

    The loops of `lax.scan`, `lax.map` and `fori_loop` count from 0 by 1; those into which the compiler turns
    a product and the collective of its operand or result, from 0 by 2 where it has unrolled them.

    Raises:
      ValueError: if the condition has no constant.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    (condition,) = loop.called("condition")
    names = [condition]
    for instruction in module.computations[condition]:
        names += instruction.called("calls")
    bounds = [
        int(found[1])
        for name in names
        for instruction in module.computations[name]
        if instruction.opcode == "constant" and (found := re.match(r"(\d+)\)", instruction.rest))
    ]
    if not bounds:
        raise ValueError(f"loop {loop.name} has no constant bound in its condition {condition}")
    return -(-max(bounds) // _step(module, loop, condition))


def _step(module: Module, loop: Instruction, condition: str) -> int:
    """What a loop's body adds to the number that its condition reads; 1 where that cannot be seen."""
    (body,) = loop.called("body")
    by_name = {one.name: one for one in module.computations[body]}
    results = operands(module.computations[body][-1])
    for read in module.computations[condition]:
        place = re.search(r"index=(\d+)", read.rest) if read.opcode == "get-tuple-element" else None
        if place is None or int(place[1]) >= len(results):
            continue
        added = by_name.get(results[int(place[1])])
        if added is not None and added.opcode == "add":
            for name in operands(added):
                one = by_name.get(name)
                if one is not None and one.opcode == "constant" and (step := re.match(r"(\d+)\)", one.rest)):
                    return int(step[1]) or 1
    return 1


def operands(one: Instruction) -> list[str]:
    """The names of an instruction's operands."""
    return re.findall(r"%([\w.-]+)", one.rest.partition(")")[0])


def executed(module: Module) -> Iterator[tuple[Instruction, int]]:
    """Every executed instruction with its count; of a conditional, the most expensive branch.

    A fusion counts as one instruction.
    """
    yield from _executed(module, module.entry, 1)


def _executed(module: Module, name: str, times: int) -> Iterator[tuple[Instruction, int]]:
    for instruction in module.computations[name]:
        yield instruction, times
        for callee, count in callees(module, instruction):
            yield from _executed(module, callee, times * count)


def callees(module: Module, instruction: Instruction) -> list[tuple[str, int]]:
    """The computations that an instruction executes, and how often; of branches, the most expensive."""
    if instruction.opcode == "while":
        return [(body, trip_count(module, instruction)) for body in instruction.called("body")]
    if instruction.opcode in ("call", "async-start"):
        return [(name, 1) for name in instruction.called("to_apply") or instruction.called("calls")]
    if instruction.opcode == "conditional":
        branches = instruction.called("branch_computations") or [
            name for side in ("true", "false") for name in instruction.called(f"{side}_computation")
        ]
        return [(max(branches, key=functools.partial(_cycles, module)), 1)]
    return []


def blocks(module: Module) -> Iterator[tuple[list[Instruction], int]]:
    """Every executed computation with its count, its instructions in the order in which they are scheduled.

    What an asynchronous instruction calls is not among them.
    """
    pending = [(module.entry, 1)]
    while pending:
        name, times = pending.pop()
        instructions = module.computations[name]
        yield instructions, times
        for instruction in instructions:
            if not instruction.opcode.endswith("-start"):
                pending += [(callee, times * count) for callee, count in callees(module, instruction)]


def _cycles(module: Module, name: str) -> int:
    return sum(times * (instruction.cycles or 0) for instruction, times in _executed(module, name, 1))


def estimated_cycles(module: Module) -> int:
    """The compiler's cycles, summed over all executed instructions; attention kernels and waits have none."""
    return _cycles(module, module.entry)


def cycles_by_instruction(module: Module) -> list[tuple[int, int, Instruction]]:
    """(total cycles, count, instruction) of all instructions with a cost, most expensive first."""
    costs = [(times * i.cycles, times, i) for i, times in executed(module) if i.cycles]
    return sorted(costs, key=lambda cost: -cost[0])


def beside(module: Module, dimension: int) -> set[int]:
    """For every array with a dimension of this size, the product of its other dimensions.

    For the vocabulary size these are the numbers of positions whose logits are in one array, and the hidden
    size. Arrays inside fusions are never materialized, and are left out.
    """
    return {
        math.prod(dims) // dimension
        for instruction, _ in executed(module)
        for _, dims in instruction.arrays
        if dimension in dims
    }


def donated(module: Module) -> set[int]:
    """Indices of the entry's parameters that are donated: an output reuses their memory."""
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry_computation", module.header)
    return {int(n) for n in re.findall(r"\{[\d, ]*\}: \((\d+),", aliases[1])} if aliases else set()
