"""Long rows on a pod, compiled by the TPU compiler: what travels around the ring, and what a chip holds."""

from __future__ import annotations

import dataclasses

import pytest

from llama_jax.plan.estimate import estimate
from llama_jax.plan.topology import Topology
from llama_jax.train.config.mesh import MeshConfig
from llama_jax.train.config.run import RunConfig, TokenizerConfig, TrainConfig
from llama_jax.train.planning import model_of
from llama_jax.train.planning.compiling import plan_compiled
from llama_jax.train.planning.inputs import step_inputs
from tests.train.test_planning import SMALL

TOPOLOGY = Topology.parse("v5p:4x4x4")


def plans(tmp_path, monkeypatch, *, context: int, layers: int = 2):
    """Compiled, and by arithmetic: 2,048 tokens a chip, of rows over `context` chips."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    length = 2048 * context
    run = RunConfig(
        model=dataclasses.replace(SMALL, max_position_embeddings=length, num_hidden_layers=layers),
        tokenizer=TokenizerConfig(vocab_size=2048),
        train=TrainConfig(global_batch_size=64 // context, seq_len=length, remat="save_projections"),
        mesh=MeshConfig(context=context, fsdp=64 // context),
    )
    inputs = run, model_of(run), TOPOLOGY
    return plan_compiled(*inputs), estimate(step_inputs(*inputs))


def moved(plan, kind):
    return sum(one.bytes for one in plan.traffic if one.kind == kind)


@pytest.mark.pods
def test_keys_travel_around_the_ring_and_memory_does_not_grow_with_it(tmp_path, monkeypatch):
    plan, estimated = plans(tmp_path, monkeypatch, context=8)
    for kind in ("collective-permute", "reduce-scatter"):
        assert moved(plan, kind) == pytest.approx(moved(estimated, kind), rel=0.02), kind
    assert {one.axes for one in plan.traffic if one.kind == "collective-permute"} == {"context"}
    # What is gathered is the weights: no key and no value. Over two axes of the mesh at once, the compiler
    # may fill an array with zeros and sum it, at twice the bytes.
    gathered = moved(plan, "all-gather") + moved(plan, "all-reduce") / 2
    assert gathered == pytest.approx(moved(estimated, "all-gather"), rel=0.02)
    # Rows twice as long over twice as many chips: the same memory.
    longer, _ = plans(tmp_path, monkeypatch, context=16)
    assert longer.memory.peak == pytest.approx(plan.memory.peak, rel=0.02)
    # Twice the layers: what they save and their state, and nothing else.
    deeper, _ = plans(tmp_path, monkeypatch, context=8, layers=4)
    of_layers = plan.memory.activations + 4 * plan.memory.parameters
    assert deeper.memory.peak - plan.memory.peak < 1.1 * of_layers
