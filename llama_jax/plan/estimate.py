"""`estimate`: the cost of a training step from arithmetic alone, in milliseconds and without a compiler."""

from __future__ import annotations

from llama_jax.plan.calibration import calibration
from llama_jax.plan.chips import CHIPS
from llama_jax.plan.communication import plan_traffic
from llama_jax.plan.compute import attention_block, plan_compute
from llama_jax.plan.flops import flops_by_attention
from llama_jax.plan.inputs import StepInputs
from llama_jax.plan.memory import plan_memory
from llama_jax.plan.program import LOOP_LAUNCH, STEP_LAUNCH
from llama_jax.plan.result import StepPlan


def estimate(inputs: StepInputs) -> StepPlan:
    """The plan of a step, with `source` `arithmetic`.

    Raises:
      ConfigError: for a chip without constants.
    """
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
