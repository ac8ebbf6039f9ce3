"""What a compiled step's instructions are for, and their FLOPs."""

from __future__ import annotations

import pytest

from llama_jax.plan import hlo, parts
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.parts import Shapes

V5P = CHIPS["v5p"]
SHAPES = Shapes(hidden=64, feed_forward=256, vocab=512)
# In the TPU compiler's own words: products are convolutions inside fusions; kernels are custom calls, whose
# operands are in their layout constraints, and whose attributes run over several lines.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%gate (x: bf16[128,64], w: bf16[64,256]) -> bf16[128,256] {
  %x = bf16[128,64]{1,0} parameter(0)
  %w = bf16[64,256]{1,0} parameter(1)
  ROOT %dot = bf16[128,256]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
}

%heads (x: bf16[128,64,1], w: bf16[64,4,16]) -> bf16[128,4,16] {
  %x.1 = bf16[128,64,1]{1,0,2} parameter(0)
  %w.1 = bf16[64,4,16]{2,0,1} parameter(1)
  ROOT %dot.1 = bf16[128,4,16]{2,0,1} convolution(%x.1, %w.1), window={size=4 pad=3_3 rhs_reversal=1}, \
dim_labels=bf0_i0o->b0f
}

%out (x: bf16[128,4,16], w: bf16[4,16,64]) -> bf16[128,64,1] {
  %x.4 = bf16[128,4,16]{2,0,1} parameter(0)
  %w.4 = bf16[4,16,64]{2,1,0} parameter(1)
  ROOT %dot.4 = bf16[128,64,1]{1,0,2} convolution(%x.4, %w.4), window={size=4}, dim_labels=b0f_0io->bf0
}

%logits (x: bf16[32,64], w: bf16[64,512]) -> f32[32,512] {
  %x.2 = bf16[32,64]{1,0} parameter(0)
  %w.2 = bf16[64,512]{1,0} parameter(1)
  ROOT %dot.2 = f32[32,512]{1,0} dot(%x.2, %w.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%norm (x: f32[128,64]) -> f32[128,64] {
  ROOT %scaled = f32[128,64]{1,0} copy(%x.3)
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %gate.1 = bf16[128,256]{1,0} fusion(%a, %b), kind=kOutput, calls=%gate, \
metadata={op_name="jit(step)/while/body/jvp(f)/Block/feed_forward/btd,df->btf/dot_general"}, \
backend_config={"estimated_cycles":"1750"}
  %q.1 = bf16[128,4,16]{2,0,1} fusion(%a, %c), kind=kOutput, calls=%heads, \
metadata={op_name="jit(step)/while/body/jvp(f)/Block/attention/dot_general"}, \
backend_config={"estimated_cycles":"3500"}
  %out.1 = bf16[128,64,1]{1,0,2} fusion(%q.1, %c), kind=kOutput, calls=%out, \
metadata={op_name="jit(step)/while/body/jvp(f)/Block/attention/dot_general"}, \
backend_config={"estimated_cycles":"3500"}
  %splash_mha_fwd_segmented_residuals.1 = (bf16[4,128,16]{2,1,0}, f32[4,128]) custom-call(%m, %q, %k, %v), \
custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,1,1]{2,1,0}, \
bf16[4,128,16]{2,1,0}, bf16[2,128,16]{2,1,0}, bf16[2,128,16]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128}"
}}
  %norm.1 = f32[128,64]{1,0} fusion(%a), kind=kLoop, calls=%norm, backend_config={"estimated_cycles":"175"}
  ROOT %next = (s32[], f32[8]) tuple(%i, %norm.1)
}

%condition (s: (s32[], f32[8])) -> pred[] {
  %bound = s32[] constant(3)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  %logits.1 = f32[32,512]{1,0} fusion(%a, %b), kind=kOutput, calls=%logits, \
metadata={op_name="jit(step)/jvp(f)/dot_general"}, backend_config={"estimated_cycles":"7000"}
  %adam = f32[64]{0} fusion(%a), kind=kLoop, calls=%norm, metadata={op_name="jit(step)/add"}, \
backend_config={"estimated_cycles":"17"}
  ROOT %result = f32[8]{0} get-tuple-element(%while.1), index=1
}
""".replace("\\\n", "")


def found(text: str = PROGRAM, *, balanced: bool = False) -> dict[str, parts.Operation]:
    operations = parts.operations(hlo.parse(text), SHAPES, V5P, balanced=balanced)
    return {one.instruction.name: one for one in operations}


def test_parts_and_flops():
    told = {name: (one.part, one.times, one.flops) for name, one in found().items()}
    assert told == {
        "gate.1": ("feed-forward products", 3, 2 * 128 * 64 * 256),
        "q.1": ("attention projections", 3, 2 * 128 * 64 * 4 * 16),
        "out.1": ("attention projections", 3, 2 * 128 * 4 * 16 * 64),
        "splash_mha_fwd_segmented_residuals.1": ("attention kernels", 3, 2 * 2 * 4 * 128 * 128 * 16 / 2),
        "norm.1": ("elementwise", 3, 0),
        "logits.1": ("output projection and loss", 1, 2 * 32 * 64 * 512),
        "adam": ("optimizer", 1, 0),
    }
    assert found()["gate.1"].seconds == pytest.approx(1e-6)


def test_the_parts_add_up_to_the_time_of_all_operations():
    operations = list(found().values())
    whole = sum(one.seconds * one.times for one in operations)
    assert sum(part.seconds for part in parts.summed(operations, V5P)) == pytest.approx(whole)


KERNEL = PROGRAM[PROGRAM.index("  %splash") : PROGRAM.index("  %norm.1")]


def kernel_flops(queries: int, keys: int, *, balanced: bool) -> float:
    shapes = KERNEL.replace("bf16[4,128,16]{2,1,0}, bf16", f"bf16[4,{queries},16]{{2,1,0}}, bf16", 1)
    shapes = shapes.replace("bf16[2,128,16]", f"bf16[2,{keys},16]")
    (one,) = [one for one in found(PROGRAM.replace(KERNEL, shapes), balanced=balanced).values() if
              one.part == "attention kernels"]  # fmt: skip
    return one.flops


def test_in_contiguous_shards_the_last_one_decides():
    """It reads all keys but half of its own: of C shards, 2 - 1/C times the mean."""
    mean = 2 * 2 * 4 * 128 * (8 * 128) * 16 / 2
    assert kernel_flops(128, 8 * 128, balanced=False) == pytest.approx(mean * (2 - 1 / 8))


def test_in_a_balanced_ring_a_device_reads_half_of_its_own_keys_and_all_that_it_is_sent():
    square = 2 * 2 * 4 * 128 * 128 * 16
    assert kernel_flops(128, 128, balanced=True) == square / 2
    assert kernel_flops(128, 64, balanced=True) == kernel_flops(64, 128, balanced=True) == square / 2


def test_products_of_backward_kernels():
    """Five in ours, and in JAX's where one kernel computes all gradients; otherwise seven."""
    ours = PROGRAM.replace("splash_mha_fwd_segmented_residuals.1", "splash_gradient.1")
    backward = PROGRAM.replace("splash_mha_fwd", "splash_mha_dkv")
    forward = found()["splash_mha_fwd_segmented_residuals.1"].flops
    assert found(ours)["splash_gradient.1"].flops == 5 / 2 * forward
    stated = ours.replace("s8[1,1,1]{2,1,0}, ", 's8[1,1,1]{2,1,0}}, b={"cost_estimate":{"flops":"77"}}, c={')
    assert found(stated)["splash_gradient.1"].flops == 77
    assert found(backward)["splash_mha_dkv_segmented_residuals.1"].flops == 5 / 2 * forward
    both = PROGRAM.replace(KERNEL, KERNEL.replace("_fwd_", "_dkv_") + KERNEL.replace("_fwd_", "_dq_"))
    kernels = [one.flops for one in found(both).values() if one.part == "attention kernels"]
    assert sum(kernels) == 7 / 2 * forward


def test_where_an_instruction_is_from():
    sources = {name: parts.source(one.instruction) for name, one in found().items()}
    assert sources["gate.1"] == "Block/feed_forward/btd,df->btf/dot_general"
    assert sources["norm.1"] == ""
    backward = PROGRAM.replace("while/body/jvp(f)", "while/body/transpose(jvp(f))/checkpoint")
    again = parts.source(found(backward)["gate.1"].instruction)
    assert again == "backward Block/feed_forward/btd,df->btf/dot_general"
