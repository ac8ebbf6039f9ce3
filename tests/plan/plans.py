"""Plans made by hand."""

from __future__ import annotations

import dataclasses

from llama_jax.plan.result import Memory, Part, StepPlan, Traffic

PLAN = StepPlan(
    source="compiled",
    topology="v5p:4x4x4",
    chips=64,
    mesh={"data": 1, "fsdp": 64, "context": 1, "tensor": 1},
    tokens_per_step=1 << 20,
    steps=1000,
    memory=Memory(
        parameters=4e9,
        optimizer=9e9,
        gradients=4e9,
        activations=50e9,
        logits=1e9,
        temporaries=10e9,
        peak=78e9,
        capacity=95e9,
    ),
    parts=(
        Part("feed-forward products", 10.0, flops=4e15, bound="mxu"),
        Part("attention kernels", 3.0, flops=6e14, bound="mxu"),
        Part("optimizer", 0.1, hbm_bytes=2.5e11, bound="hbm"),
    ),
    traffic=(
        Traffic("all-gather", "fsdp", "ici", 1.1e12, 4.0, 0.5),
        Traffic("all-reduce", "data", "dcn", 4.3e9, 1.0, 0.25),
    ),
    launch_seconds=0.15,
    peak_flops=459e12,
    model_flops=64 * 3.2e15,
    model_flops_full_attention=64 * 3.5e15,
    notes=("Stragglers are not modelled.",),
    details={
        "operations": [
            {"seconds": 1.5, "times": 320, "name": "fusion.7", "part": "feed-forward", "source": "a<b"}
        ]
    },
)
TOO_LARGE = dataclasses.replace(PLAN, memory=dataclasses.replace(PLAN.memory, activations=80e9, peak=108e9))
