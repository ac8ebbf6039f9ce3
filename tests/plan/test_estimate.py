"""The arithmetic of a step's cost: laws, closed forms, and the compiler's numbers beside it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_args

import pytest

from benchmarks import plan_accuracy
from llama_jax.errors import ConfigError
from llama_jax.model_sizes import presets
from llama_jax.ops import int8_sum
from llama_jax.ops.remat import Remat
from llama_jax.plan.estimate import estimate
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.memory import SAVED
from llama_jax.plan.topology import Topology
from llama_jax.plan.weights import layer_size, parameters_per_chip, table_size

MODEL = presets.LLAMA2_70B


def mesh(**sizes: int) -> dict[str, int]:
    return {"data": 1, "fsdp": 1, "context": 1, "tensor": 1} | sizes


def step(topology: str = "v5p:4x4x4", **changes: object) -> StepInputs:
    given = {"mesh": mesh(fsdp=64), "global_batch_size": 256, "seq_len": 4096, "accumulation": 4}
    return StepInputs(MODEL, Topology.parse(topology), **(given | {"remat": "save_projections"} | changes))


def moved(inputs: StepInputs, kind: str, axes: str) -> float:
    return sum(one.bytes for one in estimate(inputs).traffic if (one.kind, one.axes) == (kind, axes))


def seconds(inputs: StepInputs, *names: str) -> float:
    return sum(part.seconds for part in estimate(inputs).parts if part.name in names)


def test_eight_bits_gather_half_the_bytes_and_are_faster_where_the_chip_has_units():
    plain, int8 = step(), step(quantization="int8")
    tables = 2 * 4 * table_size(MODEL) * 2 * 63 / 64
    assert moved(int8, "all-gather", "fsdp") - tables == pytest.approx(
        (moved(plain, "all-gather", "fsdp") - tables) / 2
    )
    products = "feed-forward products", "attention projections"
    for kind, quantization, faster in [
        ("v5p:4x4x4", "int8", True),
        ("v4:4x4x4", "int8", False),
        ("v5p:4x4x4", "fp8", False),
        ("tpu7x:4x4x2", "fp8", True),
    ]:
        plain, small = step(kind), step(kind, quantization=quantization)
        assert (seconds(small, *products) < seconds(plain, *products)) == faster
        assert seconds(small, "attention kernels") == seconds(plain, "attention kernels")
        assert seconds(small, "quantization") > 0 == seconds(plain, "quantization")


def test_memory_falls_with_fsdp():
    peaks = [
        estimate(step(f"v5p:4x4x{side}", mesh=mesh(fsdp=16 * side), global_batch_size=64 * side)).memory.peak
        for side in (4, 8, 16)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_memory_is_flat_when_context_and_length_grow_together():
    plans = [
        estimate(
            step(
                mesh=mesh(fsdp=8, context=8 // 2**k, data=2**k),
                seq_len=131072 // 2**k,
                accumulation=1,
                global_batch_size=16 * 2**k,
            )
        )
        for k in range(3)
    ]
    activations = {plan.memory.activations for plan in plans}
    assert len(activations) == 1


@pytest.mark.parametrize("remat", SAVED)
def test_every_policy_has_a_plan_whose_parts_add_up(remat):
    plan = estimate(step(remat=remat))
    memory = plan.memory
    parts = memory.parameters + memory.optimizer + memory.gradients + memory.activations + memory.temporaries
    assert memory.peak == pytest.approx(parts)
    assert plan.step_seconds == pytest.approx(
        plan.compute_seconds + plan.exposed_seconds + plan.launch_seconds
    )
    # Products alone compute the model's FLOPs and what is recomputed.
    assert sum(part.flops for part in plan.parts) * plan.chips > plan.model_flops
    assert 0 < plan.mfu <= plan.mfu_without_waiting < plan.mfu_full_attention * 1.2


def test_every_remat_policy_of_a_run_is_in_the_table():
    assert set(get_args(Remat)) <= set(SAVED)


def test_more_saved_is_more_memory_and_less_time():
    chain = ["full", "attention", "save_projections", "save_dots"]
    plans = [estimate(step(remat=remat)) for remat in chain]
    assert [p.memory.activations for p in plans] == sorted(p.memory.activations for p in plans)
    flops = [sum(part.flops for part in plan.parts) for plan in plans]
    assert flops == sorted(flops, reverse=True)


def test_bytes_over_fsdp_are_the_closed_form():
    """Two gathers of every layer in bf16, one of each table, and one scatter in f32, in each microbatch."""
    layers, table, share = MODEL.num_hidden_layers * layer_size(MODEL), table_size(MODEL), 63 / 64
    inputs = step()
    assert moved(inputs, "all-gather", "fsdp") == pytest.approx(4 * 2 * (2 * layers + 2 * table) * share)
    assert moved(inputs, "reduce-scatter", "fsdp") == pytest.approx(4 * 4 * (layers + 2 * table) * share)
    assert moved(dataclasses.replace(inputs, accumulation=2), "all-gather", "fsdp") == pytest.approx(
        moved(inputs, "all-gather", "fsdp") / 2
    )


def test_windows_over_context_receive_what_they_reach_and_full_layers_all_keys():
    inputs = step(mesh=mesh(fsdp=8, context=8))
    windows = MODEL.replace(sliding_window=513, window_layers=(True, False) * 40)
    found = dataclasses.replace(inputs, model=windows)
    # Of 4 microbatches of 8 rows keys and values in bf16: forward, again, and the gradients.
    token = 4 * 8 * 2 * MODEL.num_key_value_heads * MODEL.head_dim * 2
    assert moved(found, "collective-permute", "context") == 3 * token * 40 * 512
    assert moved(found, "all-gather", "context") == 2 * token * 40 * 4096 * 7 / 8
    alone = dataclasses.replace(inputs, model=MODEL.replace(sliding_window=513))
    assert moved(alone, "collective-permute", "context") == 3 * token * 80 * 512
    assert moved(alone, "all-gather", "context") == 0 < moved(inputs, "collective-permute", "context")


def test_a_value_model_of_the_same_size_doubles_the_step_but_for_logits_and_activations():
    plain = estimate(step(accumulation=1))
    both = estimate(step(accumulation=1, value_model=MODEL.replace(labels=("LABEL_0",))))
    for name in ("parameters", "optimizer", "gradients"):
        assert getattr(both.memory, name) == pytest.approx(2 * getattr(plain.memory, name), rel=0.01)
    assert both.memory.activations == plain.memory.activations  # one after the other
    assert both.memory.logits == plain.memory.logits
    head = "output projection and loss"
    for ours, theirs in zip(both.parts, plain.parts, strict=True):
        assert ours.seconds == pytest.approx(theirs.seconds * (1 if ours.name == head else 2), rel=0.01)
    bytes_of = lambda plan: sum(one.bytes for one in plan.traffic)  # noqa: E731
    assert 1.95 * bytes_of(plain) < bytes_of(both) < 2 * bytes_of(plain)  # but for one table
    assert 1.95 * plain.model_flops < both.model_flops < 2 * plain.model_flops
    assert both.tokens_per_step == plain.tokens_per_step


@pytest.mark.parametrize("sizes", [{"fsdp": 64}, {"fsdp": 16, "tensor": 4}, {"fsdp": 8, "context": 8}])
def test_a_teacher_of_the_same_size_costs_what_a_reference_model_does_and_its_weights(sizes):
    alone = step(mesh=mesh(**sizes), remat="full")  # a forward pass saves nothing
    teacher, reference = (
        estimate(dataclasses.replace(alone, **given)) for given in ({"teacher": MODEL}, {"reference": True})
    )
    for ours, theirs in zip(teacher.parts, reference.parts, strict=True):
        assert (ours.name, ours.seconds, ours.flops) == (
            theirs.name,
            pytest.approx(theirs.seconds),
            pytest.approx(theirs.flops),
        )
    moved = [
        [(one.kind, one.axes, round(one.bytes)) for one in plan.traffic] for plan in (teacher, reference)
    ]
    assert moved[0] == moved[1]
    assert teacher.exposed_seconds == pytest.approx(reference.exposed_seconds)
    assert teacher.model_flops == pytest.approx(reference.model_flops)
    plain = estimate(alone)
    weights = 2 * parameters_per_chip(MODEL, alone.mesh)
    assert teacher.memory.parameters - plain.memory.parameters == pytest.approx(weights)
    assert teacher.memory.peak - plain.memory.peak == pytest.approx(weights + plain.memory.logits)


def test_a_reward_model_beside_the_step_has_its_weights_there_and_nothing_else():
    plain, with_one = estimate(step()), estimate(step(beside=(MODEL,)))
    weights = 2 * parameters_per_chip(MODEL, step().mesh)
    assert with_one.memory.parameters - plain.memory.parameters == pytest.approx(weights)
    assert with_one.memory.peak - plain.memory.peak == pytest.approx(weights)
    assert (with_one.parts, with_one.traffic) == (plain.parts, plain.traffic)
    both = step(beside=(MODEL,), value_model=MODEL, teacher=MODEL)
    once = step(value_model=MODEL, teacher=MODEL)
    assert estimate(both).memory.peak - estimate(once).memory.peak == pytest.approx(weights)


def test_a_teacher_costs_by_its_own_size():
    small = dataclasses.replace(step(), model=presets.LLAMA2_7B)
    plain, distilled = estimate(small), estimate(dataclasses.replace(small, teacher=MODEL))
    forward = distilled.model_flops - plain.model_flops
    assert forward == pytest.approx(estimate(step()).model_flops / 3, rel=1e-6)
    assert distilled.memory.optimizer == plain.memory.optimizer
    assert distilled.step_seconds > 3 * plain.step_seconds


def test_two_slices_send_each_gradient_once_a_step():
    slices = Topology("v5p", (4, 4, 4), 2)
    inputs = step(topology="v5p:4x4x4")
    two = dataclasses.replace(inputs, topology=slices, mesh=mesh(data=2, fsdp=64), global_batch_size=512)
    sent = [one for one in estimate(two).traffic if one.network == "dcn"]
    assert sum(one.bytes for one in sent) == pytest.approx(4 * parameters_per_chip(MODEL, two.mesh))
    for size, kinds in ((2.0, ["all-reduce"]), (int8_sum.BYTES, ["all-to-all", "all-gather"])):
        narrow = estimate(dataclasses.replace(two, gradient_bytes=size))
        crossing = [one for one in narrow.traffic if one.network == "dcn"]
        assert sorted(one.kind for one in crossing) == sorted(kinds)
        assert sum(one.bytes for one in crossing) * 4 / size == pytest.approx(sum(o.bytes for o in sent))
        kept = narrow.memory.gradients - estimate(two).memory.gradients
        assert kept == (4 * parameters_per_chip(MODEL, two.mesh) if size < 2 else 0)


def test_a_batch_or_mesh_that_does_not_divide_is_one_line():
    with pytest.raises(ConfigError, match="does not divide into 4 microbatches"):
        step(global_batch_size=250)
    with pytest.raises(ConfigError, match="is not the 64 chips of v5p:4x4x4"):
        step(mesh=mesh(fsdp=32))


def test_the_arithmetic_needs_no_jax():
    code = (
        "import sys, llama_jax.plan.estimate, llama_jax.plan.memory; "
        "sys.exit(any(name in sys.modules for name in ('jax', 'libtpu', 'llama_jax.train')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def compiled_cases() -> list[plan_accuracy.Case]:
    return [case for case in plan_accuracy.CASES if case.key in plan_accuracy.stored()]


@pytest.mark.parametrize("case", compiled_cases(), ids=lambda case: case.key)
def test_the_arithmetic_is_close_to_the_compiled_step(case):
    """Memory within 10%, time within 15%, bytes of gathers and scatters within 2%.

    The arithmetic has no gradients of adapters, which are less than a thousandth of the bytes.
    """
    compiled = plan_accuracy.stored()[case.key]
    plan = plan_accuracy.arithmetic(case, compiled)
    for name, (ours, theirs) in plan_accuracy.compare(plan, compiled).items():
        assert ours == pytest.approx(theirs, rel=0.1 if name == "peak_bytes" else 0.15), name
    for kind in ("all-gather", "reduce-scatter"):
        moved = compiled.get("moved", {})
        if moved.get(kind, 0.0) > 1e-3 * sum(moved.values()):
            ours = sum(one.bytes for one in plan.traffic if one.kind == kind)
            assert ours == pytest.approx(compiled["moved"][kind], rel=0.02), kind


def test_every_shipped_configuration_for_slices_was_compiled():
    configs = {case.config for case in compiled_cases()}
    assert {"llama2_7b", "llama2_70b", "sft_llama2_70b"} <= configs
    assert {case.topology.partition(":")[0] for case in compiled_cases()} >= {"v5p", "v5e", "v6e"}


def test_a_window_lowers_the_time_of_attention_alone():
    """At 32k tokens a window of 4096 leaves less than a quarter of the FLOPs, and one of 32k all of them."""

    def parts(**changes: object) -> dict[str, float]:
        given = step(seq_len=32768, global_batch_size=64, accumulation=1)
        inputs = dataclasses.replace(given, model=MODEL.replace(**changes))
        return {part.name: part.seconds for part in estimate(inputs).parts}

    plain, short = parts(), parts(sliding_window=4096)
    alternating = parts(sliding_window=4096, window_layers=(True, False) * (MODEL.num_hidden_layers // 2))
    assert plain == pytest.approx(parts(sliding_window=32768))
    assert {name for name in plain if short[name] != plain[name]} == {"attention kernels"}
    name = "attention kernels"
    assert 0.2 < short[name] / plain[name] < 0.35
    assert alternating[name] == pytest.approx((short[name] + plain[name]) / 2)
