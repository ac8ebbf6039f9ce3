"""A plan in sentences: which roofline binds each part of a step, and what would change it."""

from __future__ import annotations

from collections.abc import Iterator

from llama_jax.console.terminal import human_bytes
from llama_jax.plan.result import Part, StepPlan, Traffic
from llama_jax.plan.table import BOUNDS, seconds_text

_SMALL = 0.01  # the share of a step below which a part is not worth a sentence


def explain(plan: StepPlan) -> list[str]:
    """Sentences on memory, on each part that takes 1% of the step or more, and on the collectives."""
    return [_memory(plan), *_parts(plan), *_collectives(plan), _overall(plan), *plan.notes]


def _memory(plan: StepPlan) -> str:
    memory = plan.memory
    state = memory.parameters + memory.optimizer
    share = state / memory.peak
    text = (
        f"Memory: {human_bytes(state)} of the peak of {human_bytes(memory.peak)} a chip are the training "
        f"state ({share:.0%}), {human_bytes(memory.activations)} are activations kept for the backward pass."
    )
    free = memory.capacity - memory.peak
    if free < 0:
        cure = (
            "a larger slice or more devices along mesh.fsdp"
            if share > 0.8
            else "more rematerialization (train.remat) or more train.gradient_accumulation_steps"
        )
        return f"{text} That is {human_bytes(-free)} too much: {cure} reduces it."
    if free > 0.25 * memory.capacity:
        text += (
            f" {human_bytes(free)} are free: a remat policy that keeps more, or fewer microbatches, would "
            "use them to recompute and communicate less."
        )
    return text


def _parts(plan: StepPlan) -> Iterator[str]:
    for part in sorted(plan.parts, key=lambda part: -part.seconds):
        if part.seconds >= _SMALL * plan.step_seconds:
            share = part.seconds / plan.step_seconds
            yield (
                f"{part.name.capitalize()}: {seconds_text(part.seconds)} ({share:.1%} of the step), bound by "
                f"{BOUNDS[part.bound]}{_rooflines(part, plan)}."
            )


def _rooflines(part: Part, plan: StepPlan) -> str:
    """The share of the roofline that the part reaches."""
    if part.bound == "mxu" and part.flops:
        rate = part.flops / part.seconds
        return f": {rate / 1e12:,.0f} TFLOP/s, {rate / plan.peak_flops:.0%} of the chip's peak"
    if part.bound == "hbm" and part.hbm_bytes:
        return f": it moves {human_bytes(part.hbm_bytes)}, {human_bytes(part.hbm_bytes / part.seconds)}/s"
    return ""


def _collectives(plan: StepPlan) -> Iterator[str]:
    for one in sorted(plan.traffic, key=lambda one: -one.exposed_seconds):
        if one.seconds < _SMALL * plan.step_seconds:
            continue
        hidden = 1 - one.exposed_seconds / one.seconds if one.seconds else 1.0
        where = "between slices" if one.network == "dcn" else "within a slice"
        yield (
            f"{one.kind.capitalize()} over {one.axes}, {where}: {human_bytes(one.bytes)} a chip keep its "
            f"links busy for {seconds_text(one.seconds)}, of which {hidden:.0%} is hidden behind computation"
            f"{_cure(one) if one.exposed_seconds > _SMALL * plan.step_seconds else ''}."
        )


def _cure(one: Traffic) -> str:
    if one.network == "dcn":
        cure = "mesh.gradient_dtype = bfloat16 halves it, int8 quarters it"
        return f"; {cure}, and a larger batch spreads it over more tokens"
    if "tensor" in one.axes or "context" in one.axes:
        return f"; a smaller axis {one.axes} needs less of it"
    return "; more tokens per chip and microbatch hide more of it (fewer train.gradient_accumulation_steps)"


def _overall(plan: StepPlan) -> str:
    lost = plan.exposed_seconds / plan.step_seconds
    model = plan.model_flops / (plan.chips * plan.peak_flops) / plan.step_seconds
    recomputed = sum(part.flops for part in plan.parts) * plan.chips / plan.model_flops - 1
    again = f" {recomputed:.0%} more FLOPs than the model's are computed (rematerialization, masked tiles)."
    return (
        f"In all the step takes {seconds_text(plan.step_seconds)}: MFU {model:.1%}; {lost:.1%} of it waits "
        f"for collectives.{again if recomputed > _SMALL else ''}"
    )
