"""The steps that a search considers: every mesh, remat policy and number of microbatches that divides.

The arithmetic prunes them: those that do not fit, and those that are slower than others.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from llama_jax.errors import ConfigError
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.estimate import estimate
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.memory import OFFLOADED, SAVED, plan_memory
from llama_jax.plan.result import StepPlan

_TILE = 128  # tokens, of attention's kernels: a device's two parts of a sequence are whole ones
_ALIKE = 1e-3  # times and memory within it are the same to arithmetic
AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A step, and its plan by arithmetic."""

    inputs: StepInputs
    plan: StepPlan

    @property
    def name(self) -> str:
        """Its searched settings, for a person."""
        sizes = ", ".join(f"{axis} {size}" for axis, size in self.inputs.mesh.items() if size > 1)
        name = f"{sizes or 'one chip'}, {self.inputs.remat}, {self.inputs.accumulation} microbatch"
        name += "es" if self.inputs.accumulation > 1 else ""
        vmem = self.inputs.scoped_vmem_kib
        return name + (f", scoped VMEM {vmem} KiB" if vmem else "")


@dataclasses.dataclass(frozen=True)
class Ranking:
    """The candidates that fit by arithmetic.

    Attributes:
      fastest: by predicted step time; of each mesh and remat policy the fastest alone, and of those that are
        alike by arithmetic the one with the fewest axes.
      considered: how many there were, of all that divide.
      too_large: how many of them need more memory than there is.
      smallest: the step with the least memory, whether it fits or not; None if nothing divides.
    """

    fastest: tuple[Candidate, ...]
    considered: int
    too_large: int
    smallest: StepInputs | None


def meshes(chips: int, slices: int = 1) -> Iterator[dict[str, int]]:
    """Every mesh of a number of chips; `data` is a multiple of the number of slices."""
    divisors = [size for size in range(1, chips + 1) if chips % size == 0]
    for data, context, tensor in itertools.product(divisors, divisors, divisors):
        if chips % (data * context * tensor) == 0 and data % slices == 0:
            yield dict(zip(AXES, (data, chips // (data * context * tensor), context, tensor), strict=True))


def variants(
    inputs: StepInputs, remats: Collection[str], scoped_vmem_kib: Sequence[int]
) -> Iterator[StepInputs]:
    """Every step of the same model, batch and length on the same slices that divides.

    Args:
      inputs: the step to start from.
      remats: policies to try.
      scoped_vmem_kib: values of the compiler's limit to try.
    """
    devices = inputs.topology.chips * CHIPS[inputs.topology.kind].devices
    for mesh in meshes(devices, inputs.topology.slices):
        rows, rest = divmod(inputs.global_batch_size, mesh["data"] * mesh["fsdp"])
        ragged = mesh["context"] > 1 and inputs.seq_len % (2 * _TILE * mesh["context"])
        if rest or ragged:
            continue
        counts = [count for count in range(1, rows + 1) if rows % count == 0]
        for count, remat, vmem in itertools.product(counts, remats, scoped_vmem_kib):
            try:
                yield dataclasses.replace(
                    inputs, mesh=mesh, accumulation=count, remat=remat, scoped_vmem_kib=vmem
                )
            except ConfigError:  # the model or the length does not divide
                break


def rank(
    inputs: StepInputs,
    *,
    remats: Collection[str] | None = None,
    scoped_vmem_kib: Sequence[int] | None = None,
    capacity: float | None = None,
) -> Ranking:
    """The variants of a step, pruned by memory and ranked by time, both by arithmetic.

    Args:
      inputs: the step to start from.
      remats: policies to try; by default all but those that save to host memory, whose time is not modelled.
      scoped_vmem_kib: values of the compiler's limit to try; by default that of `inputs`.
      capacity: bytes of HBM that a step may use; by default the chip's.
    """
    policies = [one for one in SAVED if one not in OFFLOADED] if remats is None else list(remats)
    limits = [inputs.scoped_vmem_kib] if scoped_vmem_kib is None else list(scoped_vmem_kib)
    best: dict[tuple[object, ...], Candidate] = {}
    considered = too_large = 0
    smallest, least = None, math.inf
    for one in variants(inputs, policies, limits):
        memory = plan_memory(one)
        considered += 1
        if memory.peak < least:
            smallest, least = one, memory.peak
        if memory.peak > (memory.capacity if capacity is None else capacity):
            too_large += 1
            continue
        found = Candidate(one, estimate(one))
        key = (*one.mesh.values(), one.remat)
        if key not in best or _order(found) < _order(best[key]):
            best[key] = found
    return Ranking(_distinct(sorted(best.values(), key=_order)), considered, too_large, smallest)


def _distinct(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Without those that arithmetic cannot tell from a better one of the same remat policy."""
    kept: list[Candidate] = []
    for one in candidates:
        if not any(_alike(one, better) for better in kept):
            kept.append(one)
    return tuple(kept)


def _alike(one: Candidate, other: Candidate) -> bool:
    a, b = one.plan, other.plan
    return (
        one.inputs.remat == other.inputs.remat
        and math.isclose(a.step_seconds, b.step_seconds, rel_tol=_ALIKE)
        and math.isclose(a.memory.peak, b.memory.peak, rel_tol=_ALIKE)
    )


def _order(candidate: Candidate) -> tuple[float, int, float]:
    """Fastest first; of equals, the one with the fewest axes, then with the least memory."""
    axes = sum(size > 1 for size in candidate.inputs.mesh.values())
    return (round(candidate.plan.step_seconds, 6), axes, candidate.plan.memory.peak)


def changes(before: StepInputs, after: StepInputs) -> Mapping[str, tuple[object, object]]:
    """The searched fields that differ: (before, after) by name."""
    names = ("mesh", "remat", "accumulation", "scoped_vmem_kib")
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
