"""Objectives on packed rows equal those of each example alone; losses are the same on every mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.adapters import lora
from llama_jax.errors import ConfigError, InputError
from llama_jax.loss import Loss
from llama_jax.meshes import make_mesh
from llama_jax.sharding import use_mesh
from llama_jax.train.config.adapter import AdapterConfig
from llama_jax.train.config.data import DataConfig
from llama_jax.train.config.preference import PreferenceConfig
from llama_jax.train.config.run import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from llama_jax.train.feed import Feed
from llama_jax.train.metrics.evaluate import macro_f1
from llama_jax.train.objectives import make_metrics_fn
from llama_jax.train.objectives.common import segment_cumsum, segment_ends
from llama_jax.train.objectives.heads import ranking_loss
from llama_jax.train.objectives.language_modeling import neftune_noise
from llama_jax.train.objectives.preference import dpo_loss
from llama_jax.train.objectives.reference_free import orpo_loss
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import abstract_state, init_state
from llama_jax.train.step import build_step
from llama_jax.train.trainable import TrainableSpec
from tests.random_models import normal

MODEL = lj.LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
# Several NF4 blocks of 64 inputs per device, over mesh axes of sizes 4 and 2.
WIDE = MODEL.replace(hidden_size=512, intermediate_size=256, head_dim=64)
BATCH, LENGTH = 8, 32
COMPUTE = {"dtype": "float32", "remat": "none", "attention": "xla", "loss_chunks": 2}


CDPO = {"label_smoothing": 0.2, "beta": 0.3}


def run_of(objective: str, adapter: AdapterConfig | None = None, **preference: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(init_from="somewhere"),
        data=DataConfig(labels=("a", "b", "c")),
        train=TrainConfig(objective=objective, steps=8, global_batch_size=BATCH, seq_len=LENGTH, **COMPUTE),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.0),
        adapter=adapter or AdapterConfig(),
        preference=PreferenceConfig(**preference),
    )


def examples(seed: int = 0) -> dict[str, np.ndarray]:
    """Packed rows of two pairs, or four examples, of random lengths, and padding."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((BATCH, LENGTH), np.int32)
    batch = {name: ids.copy() for name in ("tokens", "segment_ids", "positions", "mask")}
    batch["value"] = np.zeros((BATCH, LENGTH), np.float32)
    for row in range(BATCH):
        start = 0
        for segment, length in enumerate(rng.integers(4, 8, 4), 1):
            at = slice(start, start + length)
            batch["tokens"][row, at] = rng.integers(0, 96, length)
            batch["segment_ids"][row, at] = segment
            batch["positions"][row, at] = np.arange(length)
            batch["mask"][row, start + 2 : start + length] = 1
            batch["value"][row, start + length - 1] = rng.integers(0, 3)
            start += length
    return batch


def segments(batch: dict[str, np.ndarray]) -> list[tuple[int, np.ndarray]]:
    """The row and positions of each example."""
    found = []
    for row, ids in enumerate(batch["segment_ids"]):
        found += [(row, np.flatnonzero(ids == segment)) for segment in range(1, ids.max() + 1)]
    return found


@jax.jit
def _run(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    logprobs = jax.nn.log_softmax(lj.forward(MODEL, params, tokens))
    return logprobs, lj.model.hidden_states(MODEL, params, tokens)


def unpacked(params: Any, batch: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each example by itself: its answer's log-probability and length, last hidden state, and value."""
    results = []
    for row, at in segments(batch):
        tokens = np.zeros((1, 8), np.int32)  # causal: padding after the example has no effect
        tokens[0, : len(at)] = batch["tokens"][row, at]
        logprobs, hidden = map(np.asarray, _run(params, tokens))
        answer = [i for i in range(1, len(at)) if batch["mask"][row, at[i]]]
        results.append(
            {
                "logprob": sum(float(logprobs[0, i - 1, tokens[0, i]]) for i in answer),
                "count": len(answer),
                "hidden": hidden[0, len(at) - 1],
                "value": float(batch["value"][row, at[-1]]),
            }
        )
    return results


@pytest.fixture(scope="module")
def params():
    return init_params(MODEL)


def init_params(model: lj.LlamaConfig) -> Any:
    shapes = jax.eval_shape(lambda key: lj.init(model, key), jax.random.key(0))
    return normal(0, shapes, 0.06, {"scale": 1.0})


@pytest.fixture(scope="module")
def score():
    return {"kernel": np.random.default_rng(5).normal(size=(64, 3)).astype(np.float32)}


@functools.cache
def metrics_fn(run: RunConfig) -> Any:
    return jax.jit(make_metrics_fn(run, MODEL, "cpu"))


def measure(objective: str, params: Any, batch: Any, **extras: Any) -> tuple[float, float, dict[str, Any]]:
    run = run_of(objective, **extras.pop("preference", {}))
    loss, metrics = metrics_fn(run)(params, batch, **extras)
    # A mean with a count of its own is given as it is, other metrics as sums.
    others = {name: np.asarray(x.mean if isinstance(x, Loss) else x) for name, x in metrics.items()}
    return float(loss.total), float(loss.count), others


def test_segment_cumsum_and_ends():
    ids = np.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 4, 4]])
    values = np.arange(12, dtype=np.float32).reshape(2, 6)
    sums, ends = jax.jit(lambda values, ids: (segment_cumsum(values, ids), segment_ends(ids)))(values, ids)
    np.testing.assert_array_equal(np.asarray(sums)[np.asarray(ends)], [1, 9, 30, 21])
    np.testing.assert_array_equal(ends, [[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]])


def test_token_logprobs_equal_log_softmax_of_forward(params):
    batch = examples()
    where = (batch["tokens"], batch["positions"], batch["segment_ids"])
    both = jax.jit(
        lambda params, *where: (
            lj.token_logprobs(MODEL, params, *where, num_chunks=3),
            jax.nn.log_softmax(lj.forward(MODEL, params, *where)),
        )
    )
    found, logprobs = map(np.asarray, both(params, *where))
    for row, at in segments(batch):
        expected = [0.0, *(logprobs[row, t - 1, batch["tokens"][row, t]] for t in at[1:])]
        np.testing.assert_allclose(found[row, at], expected, atol=1e-5)


def test_sft_loss_is_over_the_mask(params):
    batch = examples()
    total, count, _ = measure("sft", params, batch)
    each = unpacked(params, batch)
    assert count == sum(one["count"] for one in each)
    np.testing.assert_allclose(total, -sum(one["logprob"] for one in each), rtol=1e-5)


@pytest.mark.parametrize("preference", [CDPO, {"loss_type": "ipo"}], ids=["cdpo", "ipo"])
def test_dpo_on_packed_pairs_equals_each_pair_alone(params, preference):
    batch = examples()
    reference = jax.tree.map(lambda x: np.float32(0.7) * np.asarray(x), params)
    policy, before = unpacked(params, batch), unpacked(reference, batch)
    pairs = range(0, len(policy), 2)
    numbers = [
        np.array([side[i + which]["logprob"] for i in pairs], np.float32)
        for side, which in ((policy, 0), (policy, 1), (before, 0), (before, 1))
    ]
    lengths = tuple(np.array([policy[i + which]["count"] for i in pairs], np.float32) for which in (0, 1))
    settings = {"beta": 0.1, **preference}
    losses, chosen, rejected = map(
        np.asarray, jax.jit(functools.partial(dpo_loss, **settings))(*numbers, lengths=lengths)
    )
    total, count, others = measure("dpo", params, batch, preference=preference, reference=reference)
    assert count == len(losses) == 2 * BATCH
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-4)
    np.testing.assert_allclose(others["accuracy"], (chosen > rejected).sum())
    np.testing.assert_allclose(others["reward_margin"], (chosen - rejected).sum(), rtol=1e-3, atol=1e-4)


REFERENCE_FREE = {
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.1},
    "orpo": {"beta": 0.3},
}


def reference_free_loss(objective: str, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """SimPO (arXiv 2405.14734, eq. 6), ORPO (2403.07691, eq. 6 and 7) of mean log-probabilities, in f64."""
    log_sigmoid = lambda x: -np.log1p(np.exp(-x))  # noqa: E731
    if objective == "simpo":
        margin = 2.0 * chosen - 2.0 * rejected - 1.0
        return -0.9 * log_sigmoid(margin) - 0.1 * log_sigmoid(-margin)
    odds = [np.exp(x) / (1 - np.exp(x)) for x in (chosen, rejected)]
    return -chosen - 0.3 * log_sigmoid(np.log(odds[0] / odds[1]))


@pytest.mark.parametrize("objective", REFERENCE_FREE)
def test_reference_free_losses_on_packed_pairs_equal_each_pair_alone(params, objective):
    batch, settings = examples(), REFERENCE_FREE[objective]
    means = np.array([one["logprob"] / one["count"] for one in unpacked(params, batch)])
    chosen, rejected = means[::2], means[1::2]
    total, count, others = measure(objective, params, batch, preference=settings)
    assert count == len(chosen)
    np.testing.assert_allclose(total, reference_free_loss(objective, chosen, rejected).sum(), rtol=1e-5)
    assert others["accuracy"] == (chosen > rejected).sum()
    np.testing.assert_allclose(
        others["reward_margin"], settings["beta"] * (chosen - rejected).sum(), rtol=1e-3, atol=1e-5
    )
    if objective == "orpo":
        np.testing.assert_allclose(others["nll"], -chosen.sum(), rtol=1e-5)
    assert total == pytest.approx(padded_total(objective, params, batch, settings), rel=1e-5)


KTO = {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}


def test_kto_on_packed_examples_equals_each_example_alone(params):
    """Arithmetic of arXiv 2402.01306, eq. 8, with the KL estimate over the batch's mismatched segments."""
    batch = examples()
    reference = jax.tree.map(lambda x: np.float32(1.5) * np.asarray(x), params)
    each, before = unpacked(params, batch), unpacked(reference, batch)
    gains = np.array([one["logprob"] - old["logprob"] for one, old in zip(each, before, strict=True)])
    labels = np.array([one["value"] > 0 for one in each])[::2]
    kl = max(gains[1::2].mean(), 0.0)
    assert kl > 0.01 and 4 < labels.sum() < len(labels)
    values = 1 / (1 + np.exp(-0.4 * np.where(labels, gains[::2] - kl, kl - gains[::2])))
    losses = np.where(labels, 1.5, 0.5) * (1 - values)
    total, count, others = measure("kto", params, batch, preference=KTO, reference=reference)
    assert count == len(labels)
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-5)
    np.testing.assert_allclose(others["kl"] / count, kl, rtol=1e-4)
    np.testing.assert_allclose(others["reward_desirable"], 0.4 * gains[::2][labels].mean(), rtol=1e-4)
    np.testing.assert_allclose(others["reward_undesirable"], 0.4 * gains[::2][~labels].mean(), rtol=1e-4)
    worse = measure("kto", reference, batch, preference=KTO, reference=params)
    assert worse[2]["kl"] == 0.0  # a negative estimate is none


def padded_total(objective: str, params: Any, batch: Any, settings: dict[str, Any]) -> float:
    """The loss of the same pairs, one in each row."""
    total = 0.0
    for pairs in ((1, 2), (3, 4)):
        alone = {name: np.zeros_like(x) for name, x in batch.items()}
        for row, ids in enumerate(batch["segment_ids"]):
            at = np.flatnonzero(np.isin(ids, pairs))
            for name, x in batch.items():
                alone[name][row, : len(at)] = x[row, at] - (name == "segment_ids") * (pairs[0] - 1)
        total += measure(objective, params, alone, preference=settings)[0]
    return total


def test_the_odds_of_a_certain_answer_are_finite():
    """log p = 0, which f32 gives where p is above 1 - 6e-8, also where the other answer is as certain."""
    for chosen, rejected in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-200.0, -1e-9)):
        loss, grads = jax.value_and_grad(orpo_loss, argnums=(0, 1))(chosen, rejected, beta=0.1)
        assert np.isfinite([loss, *grads]).all()


def test_preference_losses_are_those_of_their_papers():
    """DPO (arXiv 2305.18290, eq. 7), cDPO, IPO (2310.12036, eq. 17) and Llama 2's ranking loss (eq. 2)."""
    rng = np.random.default_rng(0)
    numbers = chosen, rejected, old_chosen, old_rejected = rng.normal(-9, 3, (4, 6)).astype(np.float32)
    lengths = rng.integers(1, 9, (2, 6)).astype(np.float32)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    gains = chosen - old_chosen, rejected - old_rejected
    margin = 0.3 * (gains[0] - gains[1])
    losses, *rewards = dpo_loss(*numbers, beta=0.3)
    np.testing.assert_allclose(losses, -np.log(sigmoid(margin)), rtol=1e-5)
    np.testing.assert_allclose(rewards, 0.3 * np.stack(gains), rtol=1e-5)
    smoothed = -0.8 * np.log(sigmoid(margin)) - 0.2 * np.log(sigmoid(-margin))
    np.testing.assert_allclose(dpo_loss(*numbers, beta=0.3, label_smoothing=0.2)[0], smoothed, rtol=1e-5)
    ipo = (gains[0] / lengths[0] - gains[1] / lengths[1] - 1 / 0.6) ** 2
    found = dpo_loss(*numbers, beta=0.3, loss_type="ipo", lengths=tuple(lengths))[0]
    np.testing.assert_allclose(found, ipo, rtol=1e-4)
    ranked = -np.log(sigmoid(chosen - rejected - 0.5))
    np.testing.assert_allclose(ranking_loss(chosen, rejected, 0.5), ranked, rtol=1e-5)


def test_policy_equal_to_its_reference_has_accuracy_one_half(params):
    total, count, others = measure("dpo", params, examples(), preference=CDPO, reference=params)
    np.testing.assert_allclose(total / count, np.log(2), rtol=1e-6)
    assert others["accuracy"] == count / 2


def test_rewards_on_packed_pairs_equal_each_pair_alone(params, score):
    batch = examples()
    each = unpacked(params, batch)
    head = {"kernel": score["kernel"][:, :1]}
    rewards = np.array([one["hidden"] @ head["kernel"][:, 0] for one in each])
    margins = np.array([one["value"] for one in each], np.float32)[::2]
    expected = np.asarray(ranking_loss(rewards[::2], rewards[1::2], margins))
    total, count, others = measure("reward", {**params, "score": head}, batch)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
    assert count == len(expected)
    assert others["accuracy"] == (rewards[::2] > rewards[1::2]).sum()


def test_heads_are_read_at_the_last_token_of_each_example(params, score):
    batch = examples()
    each = unpacked(params, batch)
    hidden = np.stack([one["hidden"] for one in each])
    values = np.array([one["value"] for one in each])
    logits = hidden @ score["kernel"]
    total, count, others = measure("classify", {**params, "score": score}, batch)
    picked = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(values)), values.astype(int)]
    np.testing.assert_allclose(total, -picked.sum(), rtol=1e-5)
    assert count == len(values)
    taken = logits.argmax(-1)
    assert others["accuracy"] == (taken == values).sum()
    confusion = [[((values == i) & (taken == j)).sum() for j in range(3)] for i in range(3)]
    np.testing.assert_array_equal(others["confusion"], confusion)
    mesh = make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        laid = {**lj.shard_params(params, mesh, MODEL), "score": jax.tree.map(jax.device_put, score)}
        spread = Feed.for_mesh(mesh, BATCH, LENGTH).put(batch)
        _, on_mesh = jax.jit(make_metrics_fn(run_of("classify"), MODEL, "cpu"))(laid, spread)
    np.testing.assert_array_equal(on_mesh["confusion"], confusion)
    total, _, others = measure("regress", {**params, "score": score}, batch)
    np.testing.assert_allclose(total, ((logits[:, 0] - values) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(others["mean_absolute_error"], np.abs(logits[:, 0] - values).sum(), rtol=1e-5)


def test_macro_f1_is_the_mean_f1_of_the_classes():
    found = [[5, 1, 0, 0], [2, 3, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0]]
    by_hand = []
    for i in range(4):
        hits, true, taken = found[i][i], sum(found[i]), sum(row[i] for row in found)
        if hits:
            by_hand.append(2 / (true / hits + taken / hits))  # of precision and recall
        elif true or taken:
            by_hand.append(0.0)
    assert macro_f1(np.array(found)) == pytest.approx(np.mean(by_hand))
    assert macro_f1(np.diag([3, 0, 1])) == 1.0  # absent classes are excluded


@functools.cache
def compiled(run: RunConfig, spec: str | None, model: lj.LlamaConfig) -> Any:
    mesh = spec and make_mesh(spec)
    with use_mesh(mesh):
        trainable_spec = TrainableSpec.from_config(run, "cpu", head_outputs=3)
        step, *abstract = build_step(run, model, mesh, "cpu", trainable_spec)
        return step.lower(*abstract).compile()


def train_curve(
    run: RunConfig, spec: str | None, params: Any, steps: int = 4, model: lj.LlamaConfig = MODEL
) -> tuple[np.ndarray, list[Any], Any]:
    """The losses, the trained parameters after each step, and the last state."""
    mesh = spec and make_mesh(spec)
    trainable_spec = TrainableSpec.from_config(run, "cpu", head_outputs=3)
    feed = Feed.for_mesh(mesh, BATCH, LENGTH)
    optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, run.train.steps))
    step = compiled(run, spec, model)
    with use_mesh(mesh):
        laid = params if mesh is None else lj.shard_params(params, mesh, model)
        laid = jax.tree.map(lambda x: jax.device_put(x, x.sharding, may_alias=False), laid)  # is donated
        state, frozen = init_state(model, optimizer, 0, laid, trainable_spec)
        losses, trained = [], []
        for seed in range(steps):
            state, metrics = step(state, feed.put(examples(seed % 2)), frozen)
            losses.append(float(metrics.loss))
            trained.append(jax.tree.map(np.array, state.params))
    return np.array(losses), trained, state


ADAPTERS = {
    "lora": AdapterConfig(type="lora", rank=4, base="float32"),
    "dora": AdapterConfig(type="lora", rank=4, dora=True, base="float32", target_modules=("wq", "w_down")),
    "qlora": AdapterConfig(type="lora", rank=4, base="nf4"),
    "bottleneck": AdapterConfig(type="bottleneck", bottleneck_size=8, base="int8"),
    "prefix": AdapterConfig(type="prefix", prefix_length=4, base="float32"),
}
# Every objective, every adapter and every base; keys that travel over `context`, and, with a prefix, do not.
CASES = [
    ("dpo", None, "fsdp=2,context=2,tensor=2"),
    ("orpo", "lora", "fsdp=4,context=2"),
    ("kto", None, "data=2,fsdp=2,context=2"),
    ("reward", "dora", "fsdp=2,context=4"),
    ("classify", "prefix", "fsdp=2,context=2,tensor=2"),
    ("regress", "bottleneck", "fsdp=4,tensor=2"),
    ("sft", "qlora", "fsdp=4,tensor=2"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "adapter", "spec"), CASES)
def test_losses_on_a_mesh_equal_a_single_device(objective, adapter, spec, params):
    run, model = run_of(objective, adapter and ADAPTERS[adapter]), MODEL
    quantized = adapter in ("bottleneck", "qlora")
    if quantized:
        model, params = WIDE, init_params(WIDE)
    one, trained, _ = train_curve(run, None, params, model=model)
    many, there, _ = train_curve(run, spec, params, model=model)
    np.testing.assert_allclose(many, one, rtol=1e-3 if quantized else 1e-4)
    assert one[-2:].mean() < one[:2].mean()  # on the same two batches
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), there[-1], trained[-1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fsdp=4,tensor=2", r"its 64 inputs are 1 groups of 64, .* of size \d \(sizes that would: 1\)"),
        ("data=4,tensor=2", "wo: its 64 inputs .* mesh axis tensor of size 2"),
    ],
)
def test_quantization_blocks_that_the_mesh_does_not_divide_are_named(spec, message, params):
    with pytest.raises(InputError, match=message):
        train_curve(run_of("sft", ADAPTERS["qlora"]), spec, params)


@pytest.fixture(scope="module")
def noisy(params) -> tuple[RunConfig, Any]:
    """A run with noise in its embeddings, and its curve on a single device."""
    run = run_of("sft")
    noisy = dataclasses.replace(run, train=dataclasses.replace(run.train, neftune_alpha=50.0))
    return noisy, train_curve(noisy, None, params, steps=3)


@pytest.fixture(scope="module")
def averaged(noisy, params) -> tuple[Any, Any]:
    """The curves of the same run with an EMA of the parameters, on a single device and on a mesh."""
    run, _ = noisy
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, ema_decay=0.9))
    return tuple(train_curve(run, spec, params, steps=3) for spec in (None, "fsdp=4,tensor=2"))


def test_neftune_noise_is_scaled_by_the_length_of_each_example():
    """The paper's formula, alpha / sqrt(L d) of each sequence, whatever else is in its row."""
    segment_ids = np.array([[1] * 3 + [2] * 7 + [0] * 2, [5] * 12])
    key, alpha, width = jax.random.key(3), 15.0, 4
    noise = neftune_noise(key, jnp.array(segment_ids), width, alpha)
    unit = np.asarray(jax.random.uniform(key, (2, 12, width), jnp.float32, -1.0, 1.0))
    for row, start, length in ((0, 0, 3), (0, 3, 7), (1, 0, 12)):
        at = row, slice(start, start + length)
        np.testing.assert_allclose(noise[at], unit[at] * alpha / (length * width) ** 0.5, rtol=1e-6)


@pytest.mark.slow
def test_neftune_noise_depends_on_the_step_and_is_off_in_evaluation(params, noisy, averaged):
    """The noise changes the loss, and is the same in two runs and on a mesh."""
    run, (loud, trained, _) = noisy
    np.testing.assert_array_equal(train_curve(run, None, params, steps=3)[0], loud)
    np.testing.assert_allclose(averaged[1][0], loud, rtol=1e-4)
    for step, weights in enumerate([params, *trained[:-1]]):
        losses = [metrics_fn(each)(weights, examples(step % 2))[0] for each in (run_of("sft"), run)]
        np.testing.assert_array_equal(*(loss.total for loss in losses))
        assert abs(loud[step] - losses[0].mean) > 1e-4


@pytest.mark.slow
def test_ema_of_the_parameters(params, noisy, averaged):
    _, (plain_losses, plain, _) = noisy
    (losses, found, state), (_, on_mesh, _) = averaged
    np.testing.assert_array_equal(losses, plain_losses)
    jax.tree.map(np.testing.assert_array_equal, state.moved, plain[-1])
    expected = jax.tree.map(np.asarray, params)
    for taken, weights in enumerate(plain):
        decay = np.float32(min(0.9, (1 + taken) / (10 + taken)))
        expected = jax.tree.map(lambda a, b, d=decay: d * a + (1 - d) * b, expected, weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[taken], expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), on_mesh[-1], found[-1])


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_head_replaces_the_lm_head_or_keeps_its_weights(adapter, params, score):
    """From a language model and from a classifier, the state has the structure of `abstract_state`."""
    run, labelled = run_of("classify", adapter and ADAPTERS[adapter]), MODEL.replace(labels=("a", "b", "c"))
    trainable_spec = TrainableSpec.from_config(run, "cpu", head_outputs=3)
    optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, 8))
    expected = jax.tree.structure(abstract_state(labelled, optimizer, None, trainable_spec))
    classifier = {name: tree for name, tree in params.items() if name != "lm_head"} | {"score": score}
    for weights in (params, classifier, None):
        state, frozen = init_state(labelled, optimizer, 0, weights, trainable_spec)
        assert jax.tree.structure((state, frozen)) == expected
        assert "lm_head" not in trainable_spec.merge(state.params, frozen)
        if weights is classifier:
            np.testing.assert_array_equal(state.params["score"]["kernel"], score["kernel"])


def test_optimizer_updates_only_the_adapter(params):
    run = run_of("sft", ADAPTERS["lora"])
    _, state, _, frozen = build_step(run, MODEL, None, "cpu")
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert all(name.endswith(("['a']", "['b']")) for name in names)
    size = sum(x.size for x in jax.tree.leaves(state.params))
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) < 2 * size + 10
    assert jax.tree.map(jnp.shape, frozen["base"]) == jax.tree.map(jnp.shape, params)


def test_bf16_base_gives_the_outputs_of_that_base_in_f32(params):
    """LoRA on a bf16 base computes in f32 what LoRA on the same weights in f32 does."""
    adapter = AdapterConfig(type="lora", rank=4, base="bfloat16")
    trainable_spec = TrainableSpec.from_config(run_of("sft", adapter), "cpu")
    trainable, frozen = trainable_spec.split(MODEL, params, jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen["base"])} == {jnp.dtype("bfloat16")}
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), frozen["base"])
    trainable = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.05), trainable)
    expected = lora.attach(adapter.settings, rounded, trainable)
    found = trainable_spec.merge(trainable, frozen)
    forward = jax.jit(lambda params, tokens: lj.forward(MODEL, params, tokens, dtype=jnp.float32))
    tokens = examples()["tokens"]
    np.testing.assert_allclose(forward(found, tokens), forward(expected, tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdapterConfig(type="lroa"), r"adapter\.type is 'lroa'.*did you mean.*lora"),
        (
            lambda: AdapterConfig(rank=4),
            'adapter.rank is set and adapter.type is "none"; it applies to lora:',
        ),
        (lambda: AdapterConfig(base="nf4"), "it applies to lora or bottleneck or prefix"),
        (
            lambda: AdapterConfig(type="prefix", target_modules=("wq",)),
            "it applies to lora or bottleneck: set that type",
        ),
        (lambda: AdapterConfig(type="lora", prefix_length=4), "it applies to prefix: set that type"),
        (lambda: AdapterConfig(type="prefix", prefix_length=0), r"adapter\.prefix_length is 0"),
        (lambda: AdapterConfig(type="bottleneck", target_modules=("wq",)), "'wq' matches no sublayer"),
        (
            lambda: RunConfig(
                model=ModelConfig(init_from="x"),
                adapter=AdapterConfig(type="prefix"),
                train=TrainConfig(attention="splash"),
            ),
            r'train\.attention is "splash", which does not support a prefix',
        ),
        (lambda: AdapterConfig(type="lora", target_modules=("wx",)), r"'wx' matches no projection"),
        (lambda: AdapterConfig(type="lora", base="int3"), r"adapter\.base is 'int3'"),
        (lambda: PreferenceConfig(beta=0), r"preference\.beta is 0"),
        (lambda: PreferenceConfig(label_smoothing=0.5), "below 0.5"),
        (lambda: PreferenceConfig(loss_type="ipo", label_smoothing=0.1), "leave it out"),
        (lambda: TrainConfig(objective="sfd"), r"train\.objective is 'sfd'"),
        (lambda: RunConfig(adapter=AdapterConfig(type="lora")), r"model\.init_from is not set"),
        (lambda: RunConfig(train=TrainConfig(objective="classify")), r"data\.labels is not set"),
    ],
)
def test_invalid_settings_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
