"""The training step: same losses on every mesh, with microbatches and remat; non-finite steps."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llama_jax as lj
from llama_jax.errors import ConfigError
from llama_jax.loss import Loss
from llama_jax.meshes import make_mesh
from llama_jax.ops.gradient_sums import sum_over_data
from llama_jax.plan import collectives, hlo
from llama_jax.sharding import PARAMS, TOKENS_BT, is_spec, named, param_specs, use_mesh
from llama_jax.train.config.run import OptimizerConfig, RunConfig, TrainConfig
from llama_jax.train.feed import Feed
from llama_jax.train.objectives.language_modeling import language_modeling, neftune_noise
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import TrainState, create_state
from llama_jax.train.step import build_step, make_step
from tests.optimized import optimized

MODEL = lj.LlamaConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
BATCH, LENGTH = 8, 16
RUN = RunConfig(
    train=TrainConfig(steps=20, global_batch_size=BATCH, seq_len=LENGTH, dtype="float32", loss_chunks=3),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
)
# Compiles fastest; the tests below show that results do not depend on it.
CHEAP = {"remat": "none", "attention": "xla", "loss_chunks": 1}
ALL_AXES, SHARDED, SLICES = "fsdp=2,context=2,tensor=2", "fsdp=4,tensor=2", "data=2,fsdp=4"
MICROBATCHED = {"gradient_accumulation_steps": 2}


def changed(run: RunConfig = RUN, **sections: dict[str, Any]) -> RunConfig:
    return dataclasses.replace(
        run, **{name: dataclasses.replace(getattr(run, name), **new) for name, new in sections.items()}
    )


def packed(seed: int) -> dict[str, np.ndarray]:
    """Rows of two documents and padding of random lengths; tokens mostly follow a rule."""
    rng = np.random.default_rng(seed)
    steps = np.where(rng.random((BATCH, LENGTH)) < 0.9, 5, rng.integers(0, 96, (BATCH, LENGTH)))
    at, second, end = np.arange(LENGTH), rng.integers(3, 9, (BATCH, 1)), rng.integers(9, 17, (BATCH, 1))
    segments = np.where(at < second, 1, 2) * (at < end)
    positions = np.where(at < second, at, at - second) * (at < end)
    arrays = {
        "tokens": np.cumsum(steps, 1) % 96 * (at < end),
        "segment_ids": segments,
        "positions": positions,
    }
    return {name: array.astype(np.int32) for name, array in arrays.items()}


def initial_state(run: RunConfig = RUN, spec: str | None = None) -> TrainState:
    """A copy, which a step may donate."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), _state(run.optimizer, spec))


@functools.cache
def _state(config: OptimizerConfig, spec: str | None) -> TrainState:
    # One mesh initializes the parameters itself, which a test compares; others are given them.
    params = None if spec in (None, SHARDED) else _state(config, None).params
    optimizer = make_optimizer(config, make_schedule(config, RUN.train.steps))
    with use_mesh(mesh := spec and make_mesh(spec)):
        return create_state(MODEL, optimizer, 0, params and lj.shard_params(params, mesh, MODEL))


@functools.cache
def compiled(run: RunConfig, spec: str | None) -> Any:
    mesh = spec and make_mesh(spec)
    with use_mesh(mesh):
        step, state, batch, _ = build_step(run, MODEL, mesh, "cpu")
        return step.lower(state, batch).compile()


def train_curve(run: RunConfig, spec: str | None, steps: int) -> tuple[np.ndarray, TrainState]:
    """Losses and gradient norms [steps, 2], and the state at the end."""
    mesh = spec and make_mesh(spec)
    step, feed = compiled(run, spec), Feed.for_mesh(mesh, BATCH, LENGTH)
    with use_mesh(mesh):
        state, curve = initial_state(run, spec), []
        for seed in range(steps):
            state, metrics = step(state, feed.put(packed(seed)))
            curve.append([metrics.loss, metrics.grad_norm])
    return np.array(curve, np.float32), state


@functools.cache
def curves(spec: str | None, **train: Any) -> tuple[np.ndarray, TrainState, TrainState]:
    """Losses and gradient norms of 8 steps, the state at the end, and that after the first step."""
    run = changed(train=train)
    return *train_curve(run, spec, 8), train_curve(run, spec, 1)[1]


@pytest.fixture(scope="module")
def single_device() -> tuple[np.ndarray, TrainState, TrainState]:
    curve, *states = curves(None, **CHEAP)
    assert curve[-1, 0] < curve[0, 0] - 0.5
    return curve, *states


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "train"), [(SLICES, CHEAP), (ALL_AXES, MICROBATCHED)])
def test_losses_are_the_same_on_every_mesh(single_device, spec, train):
    """The second with everything that the single device does without: microbatches, remat, chunks."""
    curve, state, _ = curves(spec, **train)
    np.testing.assert_allclose(curve[:, 0], single_device[0][:, 0], atol=1e-5)
    np.testing.assert_allclose(curve[:, 1], single_device[0][:, 1], rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, single_device[1].params
    )


def test_microbatches_on_a_mesh_give_the_same_gradient(single_device):
    """Adam's first moment after one step is a tenth of the gradient, here clipped to a norm of 1."""
    curve, _, after_one = curves(ALL_AXES, **MICROBATCHED)
    np.testing.assert_allclose(curve[0], single_device[0][0], rtol=2e-6)
    moments, expected = (optax.tree.get(state.opt_state, "mu") for state in (after_one, single_device[2]))
    assert sum(np.square(leaf).sum() for leaf in jax.tree.leaves(jax.device_get(expected))) > 0.05**2
    atol = 2e-7 * 0.1 * min(1, 1 / curve[0, 1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), moments, expected)


def test_keys_travel_over_context_and_are_never_gathered():
    """What crosses `context` whole is one number a token; keys go from device to device."""
    module = hlo.parse(compiled(changed(train=MICROBATCHED), ALL_AXES).as_text())
    mesh = make_mesh(ALL_AXES).shape
    found = collectives.find(module)
    numbers = 4 * BATCH // 2 // mesh["fsdp"] * LENGTH
    for one in found:
        axes = collectives.mesh_axes(one.groups, mesh) if one.groups else ()
        if one.kind in ("all-gather", "all-to-all") and "context" in axes and "fsdp" not in axes:
            assert one.bytes <= 3 * numbers, one  # XLA may combine those of tokens, segments and weights
    # K and V of a shard travel in the forward pass, in the backward pass, and where attention is recomputed;
    # dK and dV, in f32, one step more, home. Hidden states leave the zig-zag order; their gradients enter.
    keys = numbers // mesh["context"] * MODEL.num_key_value_heads // mesh["tensor"] * MODEL.head_dim
    hidden, ints = numbers // mesh["context"] * MODEL.hidden_size, numbers // mesh["context"]
    steps, layers = mesh["context"] - 1, MODEL.num_hidden_layers
    least, most = (2 * (layers * 2 * keys * (n * steps + steps + 1) + 2 * hidden) for n in (2, 3))
    sent = sum(one.bytes * one.times for one in found if one.kind == "collective-permute")
    assert least <= sent <= most + 2 * (3 + 3 * layers) * ints  # tokens, positions; segments with the keys


def on_two_slices(microbatches: int, **mesh: Any) -> RunConfig:
    train = {**CHEAP, "gradient_accumulation_steps": microbatches, "global_batch_size": BATCH * microbatches}
    return changed(train=train, mesh=mesh)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_gradients_cross_slices_as_shards_once_per_step(microbatches):
    """The bytes of the compiled step's collectives on each mesh axis, and how often it runs them."""
    module = hlo.parse(compiled(on_two_slices(microbatches), SLICES).as_text())
    sent: dict[tuple[str, tuple[str, ...]], int] = collections.Counter()
    for one in collectives.find(module):
        axes = collectives.mesh_axes(one.groups, make_mesh(SLICES).shape)
        sent[one.kind, axes] += one.bytes * one.times
    params = jax.eval_shape(lambda: lj.init(MODEL, jax.random.key(0)))
    sharded = jax.tree.map(lambda spec: PARAMS in spec, param_specs(MODEL), is_leaf=is_spec)
    sizes = list(zip(jax.tree.leaves(params), jax.tree.leaves(sharded), strict=True))
    matrices, vectors = (
        4 * sum(leaf.size for leaf, is_sharded in sizes if is_sharded == kind) for kind in (1, 0)
    )
    tables = 4 * 2 * MODEL.vocab_size * MODEL.hidden_size  # embedding and output projection
    scalars = 128
    # Of each matrix a quarter, the shard of fsdp; of each norm's scale the whole.
    across = matrices // 4 + vectors
    assert across <= sent.pop(("all-reduce", ("data",))) <= across + scalars
    # Within a slice, in each microbatch; the layers' matrices are gathered twice, forwards and backwards. XLA
    # may gather embedding and output projection once for all microbatches.
    layers = 2 * microbatches * (matrices - tables)
    assert sent.pop(("reduce-scatter", ("fsdp",))) == microbatches * matrices
    assert layers + tables <= sent.pop(("all-gather", ("fsdp",))) <= layers + microbatches * tables
    assert sent.pop(("all-reduce", ("fsdp",))) <= microbatches * (vectors + scalars) + scalars
    assert {axes for _, axes in sent} <= {()}


def test_microbatches_on_two_slices_give_the_same_gradient(single_device):
    run, mesh = on_two_slices(2), make_mesh(SLICES)
    feed = Feed.for_mesh(mesh, 2 * BATCH, LENGTH)
    twice = {name: np.concatenate([rows, rows]) for name, rows in packed(0).items()}  # the same mean
    with use_mesh(mesh):
        state, metrics = compiled(run, SLICES)(initial_state(run, SLICES), feed.put(twice))
    np.testing.assert_allclose([metrics.loss, metrics.grad_norm], single_device[0][0], rtol=2e-6)
    moments, expected = (optax.tree.get(s.opt_state, "mu") for s in (state, single_device[2]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-8), moments, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_cross_slices_in_the_configured_dtype(dtype):
    """In the program as it is lowered: XLA:CPU sums bf16 in f32."""
    with use_mesh(mesh := make_mesh(SLICES)):
        step, state, batch, _ = build_step(on_two_slices(1, gradient_dtype=dtype), MODEL, mesh, "cpu")
        text = step.lower(state, batch).as_text()
    sums = re.findall(r"stablehlo\.all_reduce.*?\}\) : \(tensor<((?:\d+x)*)(\w+)>\)", text, re.DOTALL)
    names = {"float32": "f32", "bfloat16": "bf16"}
    count = len(jax.tree.leaves(state.params))
    assert sum(kind == "bf16" for _, kind in sums) == (count if dtype == "bfloat16" else 0)
    assert sum(kind == names[dtype] for _, kind in sums) >= count


def test_a_step_on_two_slices_lowers_for_tpus():
    """With the TPU's attention kernel, whose mask is divided over `context`."""
    mesh = make_mesh("data=2,fsdp=2,context=2")
    run = changed(on_two_slices(2), train={"attention": "splash", "seq_len": 512, "dtype": "bfloat16"})
    with use_mesh(mesh):
        step, state, batch, _ = build_step(run, MODEL, mesh, "tpu")
        text = step.trace(state, batch).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text


def test_noise_on_embeddings_does_not_depend_on_slices():
    """A sum that weighs each element of the noise differently."""

    def total(scale: jax.Array, batch: dict[str, jax.Array], key: jax.Array) -> Any:
        noise = neftune_noise(key, batch["segment_ids"], 4, 5.0)
        return (noise * batch["weights"][..., None] * jnp.arange(1.0, 5.0)).sum(), scale

    rows = {
        "segment_ids": jnp.asarray(packed(0)["segment_ids"]),
        "weights": jax.random.normal(jax.random.key(1), (BATCH, LENGTH)),
    }
    arguments = jnp.ones(()), rows, jax.random.key(2)
    with use_mesh(mesh := make_mesh(SLICES)):
        sharded = {name: jax.device_put(x, named(mesh, TOKENS_BT)) for name, x in rows.items()}
        apart = jax.jit(sum_over_data(total, jnp.float32))(arguments[0], sharded, arguments[2])
    np.testing.assert_allclose(apart[0], jax.jit(total)(*arguments)[0], rtol=1e-5)
    assert apart[1] == 2


def host_leaves(state: TrainState) -> list[np.ndarray]:
    """Every leaf as a NumPy array."""
    plain = dataclasses.replace(state, key=jax.random.key_data(state.key))
    return [np.array(leaf) for leaf in jax.tree.leaves(plain)]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_is_initialized_sharded_with_the_values_of_a_single_device(name):
    run = changed(optimizer={"name": name, "learning_rate": 3e-3 if name == "muon" else 1e-2})
    state, without = initial_state(run, SHARDED), initial_state(run)
    with use_mesh(mesh := make_mesh(SHARDED)):
        abstract = build_step(run, MODEL, mesh, "cpu")[1]
    for sharded, unsharded in zip(host_leaves(state), host_leaves(without), strict=True):
        np.testing.assert_array_equal(sharded, unsharded)
    jax.tree.map(
        lambda leaf, expected: leaf.sharding == expected.sharding or pytest.fail(str(expected)),
        state,
        abstract,
    )
    specs = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state.params)}
    expected = [named(mesh, spec).spec for spec in jax.tree.leaves(param_specs(MODEL), is_leaf=is_spec)]
    assert [leaf.sharding.spec for leaf in jax.tree.leaves(state.params)] == expected
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape in specs]
    assert len(moments) >= len(expected)
    for leaf in moments:
        assert leaf.sharding.spec == specs[leaf.shape], leaf.shape
    local, total = (
        sum(map(size, moments)) for size in (lambda x: x.addressable_shards[0].data.size, np.size)
    )
    assert local < total / 7  # an eighth on each device, except norm scales


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_optimizers_with_auto_sharding_have_the_same_losses(name):
    rate = 0.1 if name == "adafactor" else 3e-3
    run = changed(optimizer={"name": name, "learning_rate": rate}, train=CHEAP)
    curve, _ = train_curve(run, SHARDED, 5)
    np.testing.assert_allclose(curve, train_curve(run, None, 5)[0], rtol=1e-4)


def one_step(*, gradient_accumulation_steps: int = 1, batch: Any = None, **train: Any) -> Any:
    """The metrics of one SGD step at learning rate 1, and the parameter change: the gradient."""
    step = sgd_step(
        dataclasses.replace(
            RUN.train, gradient_accumulation_steps=gradient_accumulation_steps, **{**CHEAP, **train}
        )
    )
    state = sgd_state()
    new, metrics = step(state, packed(0) if batch is None else batch)
    return metrics, jax.tree.map(lambda old, new: np.array(old) - np.array(new), state.params, new.params)


@functools.cache
def sgd_state() -> TrainState:
    return create_state(MODEL, optax.sgd(1.0), 0)


@functools.cache
def sgd_step(config: TrainConfig) -> Any:
    loss_fn, rate = language_modeling(MODEL, config, "cpu"), optax.constant_schedule(1.0)
    return jax.jit(
        make_step(
            loss_fn,
            optax.sgd(1.0),
            rate,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            max_grad_norm=0.0,
        )
    )


@pytest.fixture(scope="module")
def plain():
    return one_step()


def assert_same(got, expected, atol=2e-7):
    for name in ("loss", "tokens", "grad_norm"):
        np.testing.assert_allclose(getattr(got[0], name), getattr(expected[0], name), rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got[1], expected[1])


def test_microbatches_with_uneven_padding_give_the_same_gradient(plain):
    assert_same(one_step(gradient_accumulation_steps=4), plain)


@pytest.mark.parametrize(
    ("remat", "chunks"),
    [
        pytest.param("save_projections", 16, marks=pytest.mark.slow),
        ("full", 5),
        pytest.param("offload", 3, marks=pytest.mark.slow),
    ],
)
def test_remat_blockwise_attention_and_loss_chunks_give_the_same_gradient(plain, remat, chunks):
    assert_same(one_step(remat=remat, attention="blockwise", loss_chunks=chunks), plain)


def test_packed_documents_have_the_loss_and_gradient_of_separate_rows(plain):
    """Compared with two batches of one document per row: means of both, weighted by their tokens."""
    batch = packed(0)
    results = []
    for segment in (1, 2):
        rows = [
            {name: x[i][batch["segment_ids"][i] == segment] for name, x in batch.items()}
            for i in range(BATCH)
        ]
        separate = {
            name: np.stack([np.pad(row[name], (0, LENGTH - len(row[name]))) for row in rows])
            for name in batch
        }
        results.append(one_step(batch=separate))
    counts = np.array([metrics.tokens for metrics, _ in results])
    mean = lambda *values: sum(n * x for n, x in zip(counts / counts.sum(), values, strict=True))  # noqa: E731
    gradient = jax.tree.map(mean, *(gradient for _, gradient in results))
    np.testing.assert_array_equal(counts.sum(), plain[0].tokens)
    np.testing.assert_allclose(mean(*(metrics.loss for metrics, _ in results)), plain[0].loss, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7), gradient, plain[1])


def test_step_with_padding_only_is_finite():
    empty = {name: np.zeros((BATCH, LENGTH), np.int32) for name in packed(0)}
    metrics, update = one_step(batch=empty)
    assert metrics.loss == metrics.tokens == metrics.grad_norm == 0 and metrics.bad_run == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(update))


def toy_state(optimizer: optax.GradientTransformation) -> TrainState:
    params, zero = {"w": jnp.arange(1.0, 4.0)}, jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key(0),
        skipped=zero,
        bad_run=zero,
    )


@pytest.mark.parametrize("clip", [0.05, 1e3])
def test_clipping_matches_optax_and_grad_norm_is_before_clipping(clip):
    rate = optax.constant_schedule(1.0)
    loss_fn = lambda p, batch: Loss(total=batch["tokens"].sum() * (p["w"] ** 2).sum(), count=jnp.float32(4))  # noqa: E731
    state = toy_state(optax.sgd(rate))
    step = make_step(loss_fn, optax.sgd(rate), rate, max_grad_norm=clip)
    new, metrics = jax.jit(step)(state, {"tokens": np.full((2, 2), 3.0, np.float32)})
    mean = {"w": 12 / 4 * 2 * state.params["w"]}
    expected, _ = optax.clip_by_global_norm(clip).update(mean, optax.EmptyState())
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(mean), rtol=1e-6)
    np.testing.assert_allclose(state.params["w"] - new.params["w"], expected["w"], rtol=1e-4)
    assert (expected["w"] == mean["w"]).all() == (clip == 1e3)


def poisoned(params: Any, batch: Any) -> Loss:
    """A loss that depends on batch["tokens"]: 1 makes it NaN, 2 the gradient only, 3 makes it infinite."""
    kind = batch["tokens"][0, 0]
    x = params["w"]
    # sqrt at 0 is 0, and its derivative is infinite.
    loss = (x**2).sum() + jnp.sqrt(x[0] - x[0] + (kind != 2))
    loss = jnp.where(kind == 1, jnp.nan, jnp.where(kind == 3, jnp.inf, loss))
    return Loss(total=loss, count=jnp.float32(1.0))


@functools.cache
def poisoned_step(gradient_accumulation_steps: int) -> Any:
    schedule = make_schedule(OptimizerConfig(warmup_steps=4), 10)
    optimizer = optax.adam(schedule)
    step = make_step(poisoned, optimizer, schedule, gradient_accumulation_steps=gradient_accumulation_steps)
    return schedule, optimizer, jax.jit(step)


@pytest.mark.parametrize("gradient_accumulation_steps", [1, 2])
@pytest.mark.parametrize("kind", [1, 2, 3])
def test_nonfinite_step_is_skipped_and_counted(kind, gradient_accumulation_steps):
    schedule, optimizer, step = poisoned_step(gradient_accumulation_steps)
    state = toy_state(optimizer)
    good, bad = ({"tokens": np.full((2, 2), k, np.int32)} for k in (0, kind))
    state, metrics = step(state, good)
    assert (metrics.skipped, metrics.bad_run) == (0, 0)
    before = state
    for run in (1, 2):
        state, metrics = step(state, bad)
        assert (metrics.skipped, metrics.bad_run, state.step) == (run, run, 1 + run)
        assert not np.isfinite(metrics.loss) or not np.isfinite(metrics.grad_norm)
        for name in ("params", "opt_state"):
            jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    after, metrics = step(state, good)
    assert (after.skipped, after.bad_run, after.step) == (2, 0, 4)
    # The next finite step is the second update: learning rate and moments continue from the first.
    assert metrics.learning_rate == pytest.approx(float(schedule(1)))
    expected, _ = step(before, good)
    jax.tree.map(np.testing.assert_array_equal, after.params, expected.params)


def test_nan_in_one_weight_skips_the_step():
    state = initial_state()
    weights = np.array(state.params["layers"]["attention"]["wo"])
    weights[1, 0, 0, 0] = np.nan
    state.params["layers"]["attention"]["wo"] = jax.device_put(weights)
    before = host_leaves(state)
    new, metrics = compiled(changed(train=CHEAP), None)(state, jax.tree.map(jax.device_put, packed(0)))
    assert (metrics.skipped, metrics.bad_run) == (1, 1)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(new)]
    for name, was, now in zip(names, before, host_leaves(new), strict=True):
        if name not in (".step", ".skipped", ".bad_run"):
            np.testing.assert_array_equal(now, was, err_msg=name)


@pytest.mark.parametrize("spec", [None, pytest.param(ALL_AXES, marks=pytest.mark.slow)])
def test_state_is_donated(spec):
    text = compiled(changed(train=MICROBATCHED if spec else CHEAP), spec).as_text()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text.splitlines()[0])[1]
    assert aliases.count("-alias") == len(jax.tree.leaves(initial_state()))


def test_logits_of_a_whole_batch_are_never_materialized():
    """The program has no array of their shape, and its temporary memory is below their size."""
    model, run = (
        MODEL.replace(vocab_size=16_000),
        changed(train={"global_batch_size": 4, "seq_len": 64, "loss_chunks": 8}),
    )
    step, state, batch, _ = build_step(run, model, None, "cpu")
    program = optimized(step.lower(state, batch))
    logits = 4 * 64 * 16_000 * 4
    gradients = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.params))
    assert program.memory_analysis().temp_size_in_bytes - gradients < logits
    shapes = {
        tuple(map(int, dims.split(","))) for dims in re.findall(r"\bf32\[([\d,]+)\]", program.as_text())
    }
    assert any(16_000 in shape for shape in shapes)  # the text contains shapes
    assert not [shape for shape in shapes if 16_000 in shape and np.prod(shape) * 4 >= logits]


MICROBATCHES = (
    r"train.global_batch_size / train.gradient_accumulation_steps is 8 / 2 = 4, which mesh.data x "
    r"mesh.fsdp = 8 does not divide; set train.global_batch_size to 16"
)


def test_microbatch_that_the_mesh_does_not_divide_is_an_error():
    run = changed(train={"gradient_accumulation_steps": 2})
    with use_mesh(mesh := make_mesh("fsdp=8")), pytest.raises(ConfigError, match=MICROBATCHES):
        build_step(run, MODEL, mesh, "cpu")
