"""What to change where a step does not fit: remat policy, microbatches or mesh, found by arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from llama_jax.errors import ConfigError
from llama_jax.plan.estimate import estimate
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.memory import OFFLOADED, SAVED
from llama_jax.plan.result import StepPlan

_MOST = 5


def alternatives(inputs: StepInputs, capacity: float) -> list[tuple[str, StepPlan]]:
    """The fastest changes that fit, at most five.

    Args:
      inputs: the step as it is.
      capacity: bytes of HBM of a chip that a program may use.

    Returns:
      (settings to give, their plan): of one change by itself, else of two together; the fastest first.
    """
    single = list(_changes(inputs))
    found = _fitting(inputs, single, capacity)
    if not found:
        pairs = [{**a, **b} for a in single for b in single if a.keys().isdisjoint(b)]
        found = _fitting(inputs, pairs, capacity)
    found.sort(key=lambda one: one[1].step_seconds)
    return found[:_MOST]


def _changes(inputs: StepInputs) -> Iterator[Mapping[str, object]]:
    """Single changes, as fields of `StepInputs`."""
    for remat in SAVED:
        if remat not in OFFLOADED and remat != inputs.remat:
            yield {"remat": remat}
    microbatches = inputs.accumulation * 2
    while inputs.global_batch_size % (microbatches * inputs.batch_shards) == 0:
        yield {"accumulation": microbatches}
        microbatches *= 2
    for axis in ("tensor", "context"):
        for size in (2, 4, 8):
            if inputs.mesh["fsdp"] % size == 0:
                sizes = {axis: inputs.mesh[axis] * size, "fsdp": inputs.mesh["fsdp"] // size}
                yield {"mesh": {**inputs.mesh, **sizes}}


def _fitting(
    inputs: StepInputs, changes: Sequence[Mapping[str, object]], capacity: float
) -> list[tuple[str, StepPlan]]:
    found: dict[str, StepPlan] = {}
    for change in changes:
        try:
            plan = estimate(dataclasses.replace(inputs, **change))  # type: ignore[arg-type]
        except ConfigError:  # the batch or the model does not divide
            continue
        if plan.memory.peak <= capacity:
            found[_settings(inputs, change)] = plan
    return list(found.items())


def _settings(inputs: StepInputs, change: Mapping[str, object]) -> str:
    """A change as arguments of `llama-jax train`."""
    flags = {"remat": "--train.remat", "accumulation": "--train.gradient_accumulation_steps"}
    shown = [f"{flags[name]} {value}" for name, value in change.items() if name in flags]
    mesh = change.get("mesh")
    if isinstance(mesh, Mapping):
        shown += [f"--mesh.{name} {size}" for name, size in mesh.items() if size != inputs.mesh[name]]
    return " ".join(shown)
