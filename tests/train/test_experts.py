"""A mixture of experts in the trainer: the routers' losses, microbatches, meshes, metrics."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import ConfigError
from llama_jax.meshes import AXES, make_mesh
from llama_jax.plan import collectives, hlo
from llama_jax.plan.compute import FEED_FORWARD
from llama_jax.plan.decode import plan_decode
from llama_jax.plan.estimate import estimate
from llama_jax.plan.flops import flops_per_token
from llama_jax.plan.topology import Topology
from llama_jax.plan.weights import layer_matrices
from llama_jax.sharding import use_mesh
from llama_jax.train.config.adapter import AdapterConfig
from llama_jax.train.config.data import DataConfig
from llama_jax.train.config.mesh import MeshConfig
from llama_jax.train.config.model import ModelConfig
from llama_jax.train.config.run import OptimizerConfig, RunConfig, TrainConfig
from llama_jax.train.feed import Feed, batch_dtypes
from llama_jax.train.objectives import make_metrics_fn
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.planning.inputs import step_inputs
from llama_jax.train.state import init_state
from llama_jax.train.step import build_step
from llama_jax.train.trainable import TrainableSpec

BATCH, LENGTH = 8, 16
MODEL = lj.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    num_experts=4,
    num_experts_per_tok=2,
)
TRAIN = TrainConfig(
    steps=4,
    global_batch_size=BATCH,
    seq_len=LENGTH,
    dtype="float32",
    remat="none",
    attention="xla",
    loss_chunks=1,
    router_aux_loss_coef=0.5,
    router_z_loss_coef=0.1,
)


# What pods train with; the above compiles faster.
AS_ON_PODS = {"remat": "full", "attention": "blockwise", "loss_chunks": 2}
FULL, LORA = AdapterConfig(), AdapterConfig(type="lora", rank=4, target_modules=("w_*",))


def batch():
    rng = np.random.default_rng(0)
    segments = np.broadcast_to(
        np.where(np.arange(LENGTH) < 14, 1 + np.arange(LENGTH) // 7, 0), (BATCH, LENGTH)
    )
    return {
        "tokens": rng.integers(1, 96, (BATCH, LENGTH)).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH) % 7, (BATCH, LENGTH)).astype(np.int32),
    }


@functools.cache
def initial_params():
    return jax.device_get(lj.init(MODEL, jax.random.key(0)))


def curve(spec=None, optimizer="adamw", adapter=FULL, **changes):
    """Loss, gradient norm and router losses of each step."""
    run = RunConfig(
        train=dataclasses.replace(TRAIN, **changes),
        optimizer=OptimizerConfig(name=optimizer, learning_rate=1e-2),
        adapter=adapter,
        model=ModelConfig(init_from="" if adapter is FULL else "base"),
    )
    mesh = None if spec is None else make_mesh(spec)
    with use_mesh(mesh):
        step = build_step(run, MODEL, mesh, "cpu")[0]
        optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, 4))
        trainable_spec = TrainableSpec.from_config(run, "cpu")
        params = jax.tree.map(jnp.array, initial_params())
        params = params if mesh is None else lj.shard_params(params, mesh, MODEL)
        state, frozen = init_state(MODEL, optimizer, 0, params, trainable_spec)
        given = batch() if run.train.objective == "pretrain" else preference_batch()
        names = batch_dtypes(run.train.objective)
        rows, found = Feed.for_mesh(mesh, BATCH, LENGTH).put({name: given[name] for name in names}), []
        for _ in range(3):
            state, metrics = step(state, rows, frozen)
            found.append([metrics.loss, metrics.grad_norm, metrics.router.balance, metrics.router.z])
    return np.array(jax.device_get(found))


@pytest.fixture(scope="module")
def alone():
    return curve()


@pytest.mark.parametrize(
    "spec", ["data=2,expert=4", pytest.param("fsdp=2,expert=2,tensor=2", marks=pytest.mark.slow)]
)
def test_a_mesh_trains_as_a_single_device(alone, spec):
    np.testing.assert_allclose(curve(spec, **AS_ON_PODS), alone, rtol=2e-5)


def test_lora_of_experts_trains_on_a_mesh_as_on_a_single_device(alone):
    single = curve(adapter=LORA)
    sharded = curve("fsdp=2,expert=2,tensor=2", adapter=LORA, **AS_ON_PODS)
    np.testing.assert_allclose(sharded, single, rtol=2e-5)
    np.testing.assert_allclose(single[0, 0], alone[0, 0], rtol=1e-6)  # an update of zero
    assert single[-1, 0] < single[0, 0]


def test_the_losses_are_added_with_their_coefficients(alone):
    without = curve(router_aux_loss_coef=0.0, router_z_loss_coef=0.0)
    np.testing.assert_allclose(without[0, 2:], alone[0, 2:], rtol=1e-6)
    assert without[0, 0] + 0.5 * alone[0, 2] + 0.1 * alone[0, 3] == pytest.approx(alone[0, 0], rel=1e-6)
    assert 2 <= alone[0, 2] < 2.1  # even at first: the number of experts per token
    assert alone[-1, 3] < without[-1, 3]


def test_microbatches_have_losses_of_their_own(alone):
    preferred = curve(gradient_accumulation_steps=2, objective="dpo")
    np.testing.assert_allclose(preferred[0, 3], alone[0, 3], rtol=1e-6)
    found = curve(gradient_accumulation_steps=2)
    np.testing.assert_allclose(found[0, 3], alone[0, 3], rtol=1e-6)  # a mean over tokens
    assert found[0, 2] == pytest.approx(alone[0, 2], rel=0.02) and found[0, 2] != alone[0, 2]


def preference_batch():
    rows = batch()
    ends = np.diff(rows["segment_ids"], append=0) != 0
    is_answer = (rows["segment_ids"] > 0) & (rows["positions"] > 2)
    return rows | {"mask": is_answer.astype(np.int32), "value": np.where(ends, 1.0, 0.0).astype(np.float32)}


@pytest.mark.parametrize("objective", ["dpo", "reward", "classify", "regress"])
def test_every_objective_adds_them(objective):
    model = (
        MODEL
        if objective == "dpo"
        else MODEL.replace(labels=("a", "b") if objective == "classify" else ("a",))
    )
    params = lj.init(model, jax.random.key(0))
    data = DataConfig(labels=model.labels if objective == "classify" else ())
    kwargs = {"reference": params} if objective == "dpo" else {}

    def totals(params, rows):
        for coefficients in ((0.5, 0.1), (0.0, 0.0)):
            names = ("router_aux_loss_coef", "router_z_loss_coef")
            train = dataclasses.replace(
                TRAIN, objective=objective, **dict(zip(names, coefficients, strict=True))
            )
            yield make_metrics_fn(RunConfig(train=train, data=data), model, "cpu")(params, rows, **kwargs)[0]

    found, without = jax.jit(lambda *args: tuple(totals(*args)))(params, preference_batch())
    router = jax.tree.map(lambda x: x / found.count, found.router)
    assert 2 <= router.balance < 2.1 and router.z > 0 and found.count in (BATCH, 2 * BATCH)
    expected = without.mean + 0.5 * router.balance + 0.1 * router.z
    np.testing.assert_allclose(found.mean, expected, rtol=1e-6)


def test_muon_orthogonalizes_each_experts_matrix_by_itself():
    run = RunConfig(
        train=TRAIN,
        optimizer=OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0),
    )
    optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, 4))
    params = {"layers": lj.init(MODEL, jax.random.key(0))["layers"]}
    grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    alone = lambda tree: {"layers": {"feed_forward": {"w_up": tree["layers"]["feed_forward"]["w_up"][:, 2]}}}  # noqa: E731
    expected, _ = optimizer.update(alone(grads), optimizer.init(alone(params)), alone(params))
    np.testing.assert_allclose(*(jax.tree.leaves(tree)[0] for tree in (alone(updates), expected)), atol=1e-5)


def test_mfu_counts_the_experts_that_a_token_goes_through():
    dense = MODEL.replace(num_experts=0, num_experts_per_tok=0, intermediate_size=64)
    router = 6 * 2 * 32 * 4
    expected = flops_per_token(dense, LENGTH, causal=True) + router
    assert flops_per_token(MODEL, LENGTH, causal=True) == expected


def test_plans_count_the_weights_of_all_experts_and_the_products_of_those_that_a_token_goes_through():
    topology, run = Topology.parse("v5p:2x2x1"), RunConfig(train=TRAIN, mesh=MeshConfig(fsdp=4))
    dense = MODEL.replace(num_experts=0, num_experts_per_tok=0)
    mixture, plain = (estimate(step_inputs(run, model, topology)) for model in (MODEL, dense))
    experts, active = MODEL.num_experts, MODEL.num_experts_per_tok
    flops = [next(p.flops for p in plan.parts if p.name == FEED_FORWARD) for plan in (mixture, plain)]
    assert flops[0] == active * flops[1]
    gathered = [plan.traffic[0].bytes for plan in (mixture, plain)]
    feed_forward = 3 * MODEL.hidden_size * MODEL.intermediate_size
    attention = sum(matrix.size for matrix in layer_matrices(dense)) - feed_forward
    ratio = (attention + experts * feed_forward) / (attention + feed_forward)
    assert gathered[0] / gathered[1] == pytest.approx(ratio)
    ratio = MODEL.num_params / dense.num_params
    assert mixture.memory.parameters / plain.memory.parameters == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize("remat", ["full", "none"])
def test_a_plan_has_the_bytes_that_the_compiled_step_moves_and_holds(remat):
    """Over `expert`, and of weights over `fsdp`."""
    train = dataclasses.replace(TRAIN, **AS_ON_PODS | {"remat": remat})
    run = RunConfig(train=train, mesh=MeshConfig(fsdp=2, expert=4))
    with use_mesh(mesh := make_mesh("fsdp=2,expert=4")):
        step, state, rows, _ = build_step(run, MODEL, mesh, "cpu")
        module = hlo.parse(step.lower(state, rows).compile().as_text())
    found, planned = collections.Counter(), collections.Counter()
    for one in collectives.find(module):
        if axes := collectives.mesh_axes(one.groups, mesh.shape):
            others = 1 - 1 / math.prod(mesh.shape[axis] for axis in axes)
            found[one.kind, ",".join(axes)] += one.bytes * one.times * others
    inputs = step_inputs(run, MODEL, Topology.parse("v5e:2x4"))
    plan = estimate(dataclasses.replace(inputs, compute_bytes=4.0))
    for one in plan.traffic:
        planned[one.kind, one.axes] += one.bytes
    assert {axes for _, axes in planned} == {"expert", "fsdp", "fsdp,expert"}
    for key, size in planned.items():  # the router's matrix is left out
        assert found[key] == pytest.approx(size, rel=0.03 if key[1] == "fsdp,expert" else 1e-9), key
    shards = (leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(state.params))
    assert plan.memory.parameters == pytest.approx(4 * sum(map(math.prod, shards)), rel=1e-3)
    with pytest.raises(ConfigError, match=r"^num_experts 4 does not divide over mesh.expert 8"):
        step_inputs(dataclasses.replace(run, mesh=MeshConfig(expert=8)), MODEL, Topology.parse("v5e:2x4"))


def test_decoding_reads_the_experts_that_a_batch_chooses():
    model = lj.presets.MIXTRAL_8X7B
    dense = model.replace(num_experts=0, num_experts_per_tok=0)
    topology = Topology.parse("v5p:2x2x2")

    def plan(batch, model=model, **sizes):
        mesh = dict.fromkeys(AXES, 1) | sizes
        return plan_decode(model, topology, mesh, batch=batch, context=1024)

    # Of one token's k experts every weight is read, and nothing else, but for norms, router and a table.
    left_out = model.vocab_size * model.hidden_size + 33 * 2 * model.hidden_size + 32 * 8 * model.hidden_size
    seconds = plan(1, tensor=8).weight_seconds
    assert seconds == pytest.approx(2 * (model.num_active_params - left_out) / 8 / 0.95 / 2.765e12, rel=1e-3)
    reads = [plan(batch, tensor=8).weight_seconds for batch in (1, 2, 8, 64, 1024)]
    assert reads == sorted(reads)
    experts = model.num_params - dense.num_params - 32 * 8 * model.hidden_size
    whole = plan(1, model=dense, tensor=8).weight_seconds + 2 * experts / 8 / 0.95 / 2.765e12
    assert reads[-1] == pytest.approx(whole, rel=1e-3)
    # A device of `expert` reads its own; each holds an eighth of all weights.
    divided = plan(8 * 1024, expert=8)
    assert divided.weight_bytes == pytest.approx(2 * model.num_params / 8, rel=0.01)
    assert divided.weight_seconds < plan(8 * 1024, data=8).weight_seconds / 4
    assert divided.exposed_seconds > 0
    with pytest.raises(ConfigError, match=r"^num_experts 6 does not divide over mesh.expert 8"):
        plan(8, model=model.replace(num_experts=6), expert=8)


def test_experts_are_keys_of_the_model_section():
    model = ModelConfig(preset="tiny", num_experts=4, num_experts_per_tok=2).build(4096)
    assert (model.num_experts, model.num_experts_per_tok) == (4, 2)
    with pytest.raises(ConfigError, match=r"^model: num_experts_per_tok is 5 and num_experts 4"):
        ModelConfig(preset="tiny", num_experts=4, num_experts_per_tok=5).build(4096)
    with pytest.raises(ConfigError, match=r"train.router_aux_loss_coef is -1"):
        TrainConfig(router_aux_loss_coef=-1.0)
