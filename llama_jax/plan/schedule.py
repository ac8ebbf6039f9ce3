"""Walks a compiled program in its schedule: which collectives computation waits for, and how long.

An asynchronous collective occupies its links from its start, or from when those before it on the same links
have ended; computation goes on until the collective's end is reached. A synchronous one is waited for whole.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from llama_jax.plan import hlo
from llama_jax.plan.hlo import Instruction, Module
from llama_jax.plan.wiring import Use


@dataclasses.dataclass
class Wait:
    """What one instruction's collectives cost in a step, in seconds.

    Attributes:
      busy: for which their links are.
      exposed: for which computation waits.
    """

    busy: float = 0.0
    exposed: float = 0.0


def simulate(
    module: Module, seconds: Mapping[str, float], uses: Mapping[str, Sequence[Use]]
) -> tuple[float, dict[str, Wait]]:
    """The time of a step, and what each collective adds to it.

    A loop's body is walked twice, the second time with the links as the first has left them; further trips
    are like the second.

    Args:
      module: the program.
      seconds: of computation, by instruction name.
      uses: the links of an instruction's collectives, by the name of the instruction, or of its start.

    Returns:
      Seconds, and what is waited for by the same names.
    """
    walk = _Walk(module, seconds, uses)
    walk.computation(module.entry, 1)
    return walk.now, dict(walk.waits)


class _Walk:
    def __init__(
        self, module: Module, seconds: Mapping[str, float], uses: Mapping[str, Sequence[Use]]
    ) -> None:
        self.module, self.seconds, self.uses = module, seconds, uses
        self.now = 0.0
        self.free: dict[int, float] = {}  # of each side's links: when they are free
        self.ends: dict[str, float] = {}  # of started collectives
        self.waits: dict[str, Wait] = defaultdict(Wait)

    def computation(self, name: str, times: int) -> None:
        """Walks one execution of a computation, which stands for `times`."""
        instructions = self.module.computations[name]
        started = {one.name: one.name for one in instructions if one.opcode.endswith("-start")}
        # Where SparseCore runs a collective, the start's update hands it the operands.
        for one in instructions:
            if one.opcode.endswith("-update") and (source := operand(one)) in started:
                started[one.name] = started[source]
        updated = {started[one.name] for one in instructions if one.opcode.endswith("-update")}
        # What is sent to other slices comes back with their part in it, where it is received.
        sent = {_rendezvous(one): one.name for one in instructions if one.opcode == "send"}
        started |= {one.name: sent.get(_rendezvous(one), "") for one in instructions if one.opcode == "recv"}
        for one in instructions:
            if one.opcode == "while":
                for body in one.called("body"):
                    self._loop(body, hlo.trip_count(self.module, one), times)
            elif one.opcode.endswith(("-start", "-update")) or one.opcode == "send":
                root = started.get(one.name, one.name)
                if root in self.uses and (one.opcode.endswith("-update") or root not in updated):
                    self.ends[root] = self._occupy(root, times)
            elif one.opcode.endswith("-done") and one.opcode != "send-done":
                root = started.get(operand(one), operand(one))
                if root in self.ends:
                    self._wait(root, self.ends.pop(root), times)
            elif one.name in self.uses:
                computed = self.now + self.seconds.get(one.name, 0.0)
                end = self._occupy(one.name, times)
                self.now = computed
                self._wait(one.name, end, times)
            else:
                for callee, count in hlo.callees(self.module, one):
                    self.computation(callee, times * count)
                self.now += self.seconds.get(one.name, 0.0)

    def _loop(self, body: str, trips: int, times: int) -> None:
        if trips > 0:
            self.computation(body, times)
        if trips > 1:
            before = self.now
            self.computation(body, times * (trips - 1))
            later = (self.now - before) * (trips - 2)
            self.now += later
            self.free = {side: free + later for side, free in self.free.items()}
            self.ends = {name: end + later for name, end in self.ends.items()}

    def _occupy(self, name: str, times: int) -> float:
        """Queues an instruction's collectives on their links; when the last ends."""
        end = self.now
        for use in self.uses[name]:
            end = max([end, *(self.free.get(side, 0.0) for side in use.sides)]) + use.seconds
            self.free |= dict.fromkeys(use.sides, end)
            self.waits[name].busy += use.seconds * times
        return end

    def _wait(self, name: str, end: float, times: int) -> None:
        self.waits[name].exposed += max(end - self.now, 0.0) * times
        self.now = max(self.now, end)


def _rendezvous(instruction: Instruction) -> str:
    """By what a send to other slices and the receipt of their answer are paired."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.rest)
    return found[1] if found else instruction.name


def operand(instruction: Instruction) -> str:
    """The name of an instruction's first operand."""
    found = re.match(r"\(*[^%)]*%([\w.-]+)", instruction.rest)
    return found[1] if found else ""
