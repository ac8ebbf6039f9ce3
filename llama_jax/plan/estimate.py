"""`estimate`: the cost of a training step from arithmetic alone, in milliseconds and without a compiler."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from llama_jax.plan.calibration import calibration
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.communication import plan_traffic
from llama_jax.plan.compute import attention_block, plan_compute
from llama_jax.plan.flops import flops_by_attention
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.memory import plan_memory, teacher_memory
from llama_jax.plan.parts import HEAD
from llama_jax.plan.program import LOOP_LAUNCH, STEP_LAUNCH
from llama_jax.plan.result import Memory, Part, StepPlan, Traffic

_T = TypeVar("_T", Part, Traffic)


def estimate(inputs: StepInputs) -> StepPlan:
    """The plan of a step, with `source` `arithmetic`.

    Raises:
      ConfigError: for a chip without constants.
    """
    plan, value, teacher = _estimate(inputs), inputs.of_value_model, inputs.of_teacher
    if value is not None:
        plan = _together(plan, _estimate(value))
    return plan if teacher is None else _with_teacher(plan, teacher)


def _estimate(inputs: StepInputs) -> StepPlan:
    chip, model = CHIPS[inputs.topology.kind], inputs.model
    calibration(inputs.topology.kind)
    parts = plan_compute(inputs)
    flops = flops_by_attention(model, inputs.seq_len, frozen=inputs.frozen, reference=inputs.reference)
    launches = 2 * model.num_hidden_layers * inputs.accumulation
    notes = ["from arithmetic: nothing was compiled"]
    return StepPlan(
        source="arithmetic",
        topology=inputs.topology.name,
        chips=inputs.topology.chips,
        mesh=dict(inputs.mesh),
        tokens_per_step=inputs.tokens,
        steps=inputs.steps,
        memory=plan_memory(inputs),
        parts=parts,
        traffic=plan_traffic(inputs, parts),
        launch_seconds=STEP_LAUNCH + launches * LOOP_LAUNCH,
        peak_flops=chip.peak_flops,
        model_flops=flops["causal"] * inputs.tokens,
        model_flops_full_attention=flops["full"] * inputs.tokens,
        notes=tuple(notes),
        details={"remat": inputs.remat, "attention_block": attention_block(inputs)},
    )


def _together(policy: StepPlan, value: StepPlan) -> StepPlan:
    """A step that trains a policy and a value model, whose logits are one number a token: none.

    The compiler runs one's backward pass before the other's forward pass: what they save for it, and their
    working memory, is there one after the other.
    """
    memory = {field.name: getattr(policy.memory, field.name) for field in dataclasses.fields(Memory)}
    for name in ("parameters", "optimizer", "gradients"):
        memory[name] += getattr(value.memory, name)
    for name in ("activations", "temporaries"):
        memory[name] = max(memory[name], getattr(value.memory, name))
    names = ("parameters", "optimizer", "gradients", "activations", "temporaries")
    memory["peak"] = sum(memory[name] for name in names)
    parts = {part.name: part for part in policy.parts}
    for part in value.parts:
        if part.name != HEAD:
            parts[part.name] = _added(parts[part.name], part, ("seconds", "flops", "hbm_bytes"))
    return dataclasses.replace(
        policy,
        memory=Memory(**memory),
        parts=tuple(parts.values()),
        traffic=_both_traffic(policy.traffic, value.traffic),
        launch_seconds=policy.launch_seconds + value.launch_seconds,
        model_flops=policy.model_flops + value.model_flops,
        model_flops_full_attention=policy.model_flops_full_attention + value.model_flops_full_attention,
    )


def _with_teacher(student: StepPlan, teacher: StepInputs) -> StepPlan:
    """A step with the forward pass of a teacher: what a reference model adds to a step that trains it."""
    without, having = (
        _estimate(dataclasses.replace(teacher, reference=reference)) for reference in (False, True)
    )
    numbers = ("seconds", "flops", "hbm_bytes")
    parts = {part.name: part for part in student.parts}
    for more, less in zip(having.parts, without.parts, strict=True):
        forward = _minus(more, less, numbers)
        parts[more.name] = _added(parts[more.name], forward, numbers) if more.name in parts else forward
    numbers = ("bytes", "seconds", "exposed_seconds")
    traffic = tuple(
        _minus(more, less, numbers) for more, less in zip(having.traffic, without.traffic, strict=True)
    )
    loops = teacher.model.num_hidden_layers * teacher.accumulation
    return dataclasses.replace(
        student,
        memory=teacher_memory(teacher, student.memory),
        parts=tuple(parts.values()),
        traffic=_both_traffic(student.traffic, tuple(one for one in traffic if one.bytes)),
        launch_seconds=student.launch_seconds + loops * LOOP_LAUNCH,
        model_flops=student.model_flops + having.model_flops - without.model_flops,
        model_flops_full_attention=student.model_flops_full_attention
        + having.model_flops_full_attention
        - without.model_flops_full_attention,
    )


def _both_traffic(policy: tuple[Traffic, ...], value: tuple[Traffic, ...]) -> tuple[Traffic, ...]:
    """Of both models: collectives of the same kind over the same axes, in order, are added."""
    numbers, merged, rest = ("bytes", "seconds", "exposed_seconds"), [], list(value)
    for one in policy:
        same = (one.kind, one.axes, one.network)
        twin = next((other for other in rest if (other.kind, other.axes, other.network) == same), None)
        merged.append(one if twin is None else _added(one, twin, numbers))
        if twin is not None:
            rest.remove(twin)
    return (*merged, *rest)


def _minus(one: _T, other: _T, names: tuple[str, ...]) -> _T:
    return dataclasses.replace(one, **{name: getattr(one, name) - getattr(other, name) for name in names})


def _added(one: _T, other: _T, names: tuple[str, ...]) -> _T:
    return dataclasses.replace(one, **{name: getattr(one, name) + getattr(other, name) for name in names})
