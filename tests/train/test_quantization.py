"""`train.quantization`: a step in eight bits learns as one without, and a run resumes bit for bit."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.errors import ConfigError
from llama_jax.plan.topology import Topology
from llama_jax.train.config.run import AdapterConfig, ModelConfig, RunConfig, TrainConfig
from llama_jax.train.feed import Feed
from llama_jax.train.objectives import make_loss_fn, make_metrics_fn
from llama_jax.train.planning.inputs import step_inputs
from llama_jax.train.step import build_step
from tests.train.processes import Workshop, assert_same, interrupted
from tests.train.test_step import BATCH, CHEAP, LENGTH, MODEL, changed, initial_state, packed

INT8 = {"quantization": "int8"}
STOCHASTIC = {**INT8, "stochastic_rounding": True}
TENSOR = {**INT8, "quantization_scales": "tensor"}


@functools.cache
def losses(**train: Any) -> np.ndarray:
    """Of 8 steps."""
    run = changed(train=CHEAP | train)
    step, *_ = build_step(run, MODEL, None, "cpu")
    feed, state, found = Feed.for_mesh(None, BATCH, LENGTH), initial_state(run), []
    for seed in range(8):
        state, metrics = step(state, feed.put(packed(seed)))
        found.append(metrics.loss)
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    "train", [STOCHASTIC, {"quantization": "fp8"}, TENSOR], ids=["int8", "fp8", "tensor"]
)
def test_losses_are_near_those_without(train):
    plain, found = losses(), losses(**train)
    assert found[-1] < found[0] - 0.5
    np.testing.assert_allclose(found, plain, rtol=0.02)
    assert not np.array_equal(found, plain)


def test_each_step_and_microbatch_rounds_by_a_key_of_its_own():
    run = changed(train=CHEAP | STOCHASTIC | {"gradient_accumulation_steps": 2})
    half = packed(0)
    half = {name: np.concatenate([x[: BATCH // 2]] * 2).reshape(x.shape) for name, x in half.items()}
    loss_fn = make_loss_fn(run, MODEL, "cpu")
    gradient = jax.jit(jax.grad(lambda params, key: loss_fn(params, half, key=key).total))
    params = initial_state(run).params
    one, other, again = (gradient(params, jax.random.key(seed)) for seed in (1, 2, 1))
    same = jax.tree.map(np.array_equal, one, again)
    different = jax.tree.map(lambda a, b: not np.array_equal(a, b), one["layers"], other["layers"])
    assert all(jax.tree.leaves(same)) and all(jax.tree.leaves(different))


def test_evaluation_has_the_products_of_the_model_that_is_used():
    run = changed(train=CHEAP | INT8)
    params, batch = initial_state(run).params, packed(0)
    totals = [
        float(make_metrics_fn(each, MODEL, "cpu")(params, batch)[0].total)
        for each in (run, changed(train=CHEAP))
    ]
    assert totals[0] == totals[1] != float(make_loss_fn(run, MODEL, "cpu")(params, batch).total)


def test_a_resumed_run_with_stochastic_rounding_equals_an_uninterrupted_one(workshop: Workshop):
    flags = ("--train.quantization", "int8", "--train.stochastic_rounding", "true", "--eval.every", 0)
    workshop.train("whole", "--train.steps", 6, "--checkpoint.every", 3, *flags)
    halves = interrupted(workshop.folder / "whole")
    workshop.train(halves.name, "--train.steps", 6, "--checkpoint.every", 3, *flags)
    assert_same(workshop.folder / "whole", halves, 6)


def test_fp8_is_planned_for_chips_that_have_units_for_it():
    run = RunConfig(train=TrainConfig(quantization="fp8", seq_len=64))
    with pytest.raises(
        ConfigError, match=r'quantization is "fp8", which TPU v5p has no units for: .* "int8"'
    ):
        step_inputs(run, MODEL, Topology.parse("v5p:2x2x1"))
    assert step_inputs(run, MODEL, Topology.parse("tpu7x:2x2x1")).quantization == "fp8"


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"base": "nf4"}, 'base is "nf4"'),
        ({"base": "int8"}, 'base is "int8"'),
        ({"dora": True}, "dora is true"),
    ],
)
def test_adapters_that_products_in_eight_bits_do_not_support_are_refused(adapter, message):
    model = ModelConfig(init_from="base")
    with pytest.raises(ConfigError, match=f'quantization is "int8" and adapter.{message}'):
        RunConfig(model=model, adapter=AdapterConfig(type="lora", **adapter), train=TrainConfig(**INT8))
