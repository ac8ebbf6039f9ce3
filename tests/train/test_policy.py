"""Laws of policy optimization: advantages, ratios, averages; packed, reordered and sharded batches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llama_jax as lj
from llama_jax.errors import ConfigError
from llama_jax.meshes import make_mesh
from llama_jax.sharding import use_mesh
from llama_jax.train.config.rl import RLConfig
from llama_jax.train.config.run import ModelConfig, RunConfig, TrainConfig
from llama_jax.train.feed import Feed
from llama_jax.train.objectives import make_loss_fn
from llama_jax.train.objectives.policy import k3, metric_names, with_value
from llama_jax.train.rl.advantages import (
    equal_groups,
    generalized_advantages,
    group_advantages,
    penalized_rewards,
    whiten,
)
from llama_jax.train.state import init_state
from llama_jax.train.step import make_step

MODEL = lj.LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ROWS, LENGTH, LONGEST = 8, 24, 12
COMPUTE = {"dtype": "float32", "remat": "none", "attention": "xla", "loss_chunks": 2}


def run_of(exact: bool = False, **rl: Any) -> RunConfig:
    train = TrainConfig(
        objective="grpo", global_batch_size=ROWS, seq_len=LENGTH, exact_rollouts=exact, **COMPUTE
    )
    settings = {"rewards": ("exact_match",), "num_generations": 4, "max_completion_length": LONGEST} | rl
    return RunConfig(model=ModelConfig(init_from="somewhere"), train=train, rl=RLConfig(**settings))


@functools.cache
def params(seed: int = 0) -> Any:
    return lj.init(MODEL, jax.random.key(seed))


@functools.cache
def completions() -> dict[str, np.ndarray]:
    """A row each: a prompt, a completion and padding; ragged."""
    rng = np.random.default_rng(1)
    batch = {
        name: np.zeros((ROWS, LENGTH), np.int32) for name in ("tokens", "mask", "segment_ids", "positions")
    }
    for name in ("advantages", "old_logprobs"):
        batch[name] = np.zeros((ROWS, LENGTH), np.float32)
    for row in range(ROWS):
        prompt, answer = int(rng.integers(2, 10)), int(rng.integers(1, LONGEST))
        here = row, slice(0, prompt + answer)
        batch["tokens"][here] = rng.integers(0, MODEL.vocab_size, prompt + answer)
        batch["mask"][row, prompt : prompt + answer] = 1
        batch["segment_ids"][here], batch["positions"][here] = 1, np.arange(prompt + answer)
        batch["advantages"][here] = rng.normal()
    batch["old_logprobs"] = np.asarray(logprobs(params(), batch))
    return batch


def logprobs(weights: Any, batch: Any) -> jax.Array:
    return lj.token_logprobs(MODEL, weights, batch["tokens"], batch["positions"], batch["segment_ids"])


@functools.cache
def compiled(run: RunConfig, packed: bool = True) -> Any:
    loss_fn = make_loss_fn(run, MODEL, "cpu", packed=packed)

    def total(weights: Any, batch: Any, reference: Any) -> Any:
        loss = loss_fn(weights, batch, **({"reference": reference} if run.rl.beta else {}))
        return loss.mean, loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def value_and_grad(run: RunConfig, batch: Any, packed: bool = True) -> tuple[Any, Any]:
    (_, loss), grads = compiled(run, packed)(params(), batch, params(2))
    return loss, grads


def assert_close(a: Any, b: Any, tolerance: float = 2e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance, rtol=1e-4), a, b)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_group_sum_to_zero(scale):
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    advantages = group_advantages(rewards, scale)
    np.testing.assert_allclose(advantages.sum(1), 0, atol=1e-6)
    assert np.array_equal(np.argsort(advantages, 1), np.argsort(rewards, 1))


def test_scaled_advantages_do_not_depend_on_the_scale_of_rewards():
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    np.testing.assert_allclose(group_advantages(rewards), group_advantages(100 * rewards + 3), atol=1e-3)
    assert np.abs(group_advantages(100 * rewards, "none")).max() > 50


def test_a_group_of_equal_rewards_teaches_nothing():
    rewards = np.array([[1.0, 1, 1], [0, 1, 0], [0, 0, 0]])
    assert group_advantages(rewards)[[0, 2]].tolist() == [[0] * 3] * 2
    assert equal_groups(rewards).tolist() == [True, False, True]


def test_generalized_advantages_are_the_direct_sum():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 3, 9))
    mask = np.arange(9) >= np.array([[1], [4], [2]])
    mask &= np.arange(9) < np.array([[9], [8], [3]])
    gamma, gae_lambda = 0.9, 0.7
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda)
    for row in range(3):
        there = np.flatnonzero(mask[row])
        for t in range(9):
            expected = 0.0
            for place, k in enumerate(there[there >= t]) if mask[row, t] else ():
                after = values[row, k + 1] if k + 1 in there else 0.0
                error = rewards[row, k] + gamma * after - values[row, k]
                expected += (gamma * gae_lambda) ** place * error
            assert advantages[row, t] == pytest.approx(expected, abs=1e-6)
            assert returns[row, t] == pytest.approx(expected + values[row, t] * mask[row, t], abs=1e-6)


def test_the_advantage_with_lambda_one_is_the_return_minus_the_value():
    rewards, values = np.random.default_rng(0).normal(size=(2, 2, 6))
    advantages, returns = generalized_advantages(rewards, values, np.ones((2, 6)), gamma=1.0, gae_lambda=1.0)
    np.testing.assert_allclose(returns, np.cumsum(rewards[:, ::-1], 1)[:, ::-1], atol=1e-6)
    np.testing.assert_allclose(advantages, returns - values, atol=1e-6)


def test_penalized_rewards_sum_to_the_reward_minus_the_divergence():
    rng = np.random.default_rng(0)
    ours, reference = rng.normal(size=(2, 3, 7))
    mask = np.arange(7) >= np.array([[2], [5], [0]])
    mask[0, 6] = False
    rewards = penalized_rewards(np.array([1.0, 2, 3]), ours, reference, mask, beta=0.1)
    expected = [1, 2, 3] - 0.1 * np.where(mask, ours - reference, 0).sum(1)
    np.testing.assert_allclose(rewards.sum(1), expected, atol=1e-6)
    assert not rewards[~mask].any()


def test_whitened_values_have_mean_zero_and_variance_one():
    values = np.random.default_rng(0).normal(3, 5, size=(3, 7))
    mask = np.arange(7) < np.array([[3], [7], [1]])
    white = whiten(values, mask)
    assert white[mask].mean() == pytest.approx(0, abs=1e-6)
    assert white[mask].std() == pytest.approx(1, abs=1e-5)
    kept = whiten(values, mask, shift_mean=False)
    assert kept[mask].mean() == pytest.approx(values[mask].mean(), abs=1e-5)
    assert not white[~mask].any()


def test_the_divergence_estimate_is_unbiased_and_never_negative():
    p, q = jax.nn.softmax(jnp.array([[0.3, -1.0, 2.0], [1.0, 0.5, -0.2]]))
    estimate = k3(jnp.log(p), jnp.log(q))
    assert (estimate >= 0).all()
    assert float((p * estimate).sum()) == pytest.approx(float((p * jnp.log(p / q)).sum()), abs=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_first_update_is_reinforce_with_a_baseline(loss_type, level):
    """Ratios are 1, nothing is clipped, and the gradient is that of -A log p, averaged in the same way."""
    batch = completions()
    run = run_of(loss_type=loss_type, importance_sampling_level=level, epsilon=1e-3)
    loss, grads = value_and_grad(run, batch)
    lengths = batch["mask"].sum(1, keepdims=True)

    def reinforce(weights: Any) -> jax.Array:
        taken = -batch["advantages"] * logprobs(weights, batch) * batch["mask"]
        if level == "sequence":  # each token's part in the gradient of the mean log-probability
            taken = (taken.sum(1, keepdims=True) / lengths) * batch["mask"]
        if loss_type == "dapo":
            return taken.sum() / batch["mask"].sum()
        per_row = taken.sum(1) / (lengths[:, 0] if loss_type == "grpo" else LONGEST)
        return per_row.mean()

    assert float(loss.metrics["clip_fraction"]) == 0
    assert float(loss.metrics["tokens"]) == batch["mask"].sum()
    assert_close(grads, jax.jit(jax.grad(reinforce))(params()))


def test_ratios_are_clipped_against_the_advantage_alone():
    batch = dict(completions())
    sign = np.sign(batch["advantages"])
    mask = batch["mask"] > 0
    for shift, bound, name in (
        (0.5, {}, "clipped"),
        (-0.5, {}, "not"),
        (0.25, {"epsilon_high": 0.3}, "some"),
    ):
        moved = {**batch, "old_logprobs": batch["old_logprobs"] - shift * sign}
        loss, grads = value_and_grad(run_of(epsilon=0.2, **bound), moved)
        share = float(loss.metrics["clip_fraction"] / loss.metrics["tokens"])
        negative = (mask & (sign < 0)).sum() / mask.sum()
        assert share == pytest.approx({"clipped": 1, "not": 0, "some": negative}[name])
        if name == "clipped":
            assert optax.tree.norm(grads) == 0


def packed(batch: Any, order: Any) -> dict[str, np.ndarray]:
    """The same completions in another order, two in a row where they fit."""
    out = {name: np.zeros((ROWS, 2 * LENGTH), x.dtype) for name, x in batch.items()}
    for place, row in enumerate(order):
        into, half = divmod(place, 2)
        count = int((batch["segment_ids"][row] > 0).sum())
        start = 0 if half == 0 else int((out["segment_ids"][into] > 0).sum())
        for name, x in batch.items():
            out[name][into, start : start + count] = x[row, :count]
        out["segment_ids"][into, start : start + count] = half + 1
    return out


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_packed_and_reordered_batch_has_the_same_loss(loss_type, level):
    batch = dict(completions())
    noise = np.random.default_rng(3).normal(0, 0.2, (ROWS, LENGTH))
    batch["old_logprobs"] = batch["old_logprobs"] + noise.astype(np.float32)
    run = run_of(loss_type=loss_type, importance_sampling_level=level, beta=0.1)
    loss, grads = value_and_grad(run, batch)
    other = packed(batch, np.random.default_rng(4).permutation(ROWS))
    again, other_grads = value_and_grad(run, other)
    assert_close((loss, grads), (again, other_grads), 1e-5)
    assert float(loss.metrics["kl"]) > 0


def test_the_loss_is_the_same_on_a_mesh():
    batch = completions()
    run = run_of(loss_type="grpo", importance_sampling_level="sequence", beta=0.1)
    loss, grads = value_and_grad(run, batch)
    mesh = make_mesh("fsdp=4,tensor=2")
    with use_mesh(mesh):
        feed = Feed.for_mesh(mesh, ROWS, LENGTH)
        loss_fn = make_loss_fn(run, MODEL, "cpu", packed=False)
        total = lambda w, b, r: loss_fn(w, b, reference=r)  # noqa: E731
        sharded = [lj.init(MODEL, jax.random.key(seed)) for seed in (0, 2)]
        again = jax.jit(total)(sharded[0], feed.put(batch), sharded[1])
    assert_close(loss, again, 1e-4)
    assert optax.tree.norm(grads) > 0


def test_with_exact_rollouts_the_value_is_given_and_the_gradient_is_the_forward_pass():
    batch = dict(completions())
    run = run_of(exact=True, loss_type="grpo")
    batch["logprobs"] = batch["old_logprobs"] + np.float32(0.01)
    loss, grads = value_and_grad(run, batch)
    ratio = np.exp(np.float32(0.01))
    lengths = batch["mask"].sum(1)
    expected = -(batch["advantages"] * batch["mask"]).sum(1) / lengths * ratio
    assert float(loss.mean) == pytest.approx(expected.mean(), abs=1e-6)
    _, plain_grads = value_and_grad(run_of(loss_type="grpo"), completions())
    assert_close(grads, jax.tree.map(lambda g: g * ratio, plain_grads), 1e-5)
    assert float(loss.metrics["forward_diff"] / loss.metrics["tokens"]) == pytest.approx(0.01, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_update_alone_tells_the_logprobs_of_what_its_weights_sampled(level, temperature):
    """Loss and gradient are those of a batch that was scored before; the distance to decoding is measured."""
    run = run_of(loss_type="dapo", importance_sampling_level=level, temperature=temperature)
    assert run.logprob_arrays == ("rollout_logprobs",)
    batch, rng = dict(completions()), np.random.default_rng(6)
    plain, mask = batch.pop("old_logprobs"), batch["mask"] > 0
    # log p at the temperature, by the logits of all positions
    logits = lj.forward(MODEL, params(), *(batch[n] for n in ("tokens", "positions", "segment_ids")))
    table = jax.nn.log_softmax(logits / temperature)
    of_tokens = jnp.take_along_axis(table[:, :-1], batch["tokens"][:, 1:, None], -1)[..., 0]
    scored = {**batch, "old_logprobs": np.pad(of_tokens, ((0, 0), (1, 0)))}
    difference = rng.normal(0, 0.1, mask.shape).astype(np.float32)
    unscored = {**batch, "rollout_logprobs": plain - difference}
    loss, grads = value_and_grad(run, unscored, packed=False)
    other, other_grads = value_and_grad(run, scored)
    assert_close((loss.mean, grads), (other.mean, other_grads))
    found = {name: float(getattr(x, "value", x)) for name, x in loss.metrics.items()}
    expected = difference[mask].astype(np.float64)
    assert found["clip_fraction"] == 0
    assert found["rollout_logprob_diff_mean"] == pytest.approx(np.abs(expected).sum(), rel=1e-4)
    assert found["rollout_logprob_diff_max"] == pytest.approx(np.abs(expected).max(), rel=1e-4)
    assert found["rollout_kl"] == pytest.approx((np.expm1(expected) - expected).sum(), rel=1e-3)


def test_a_second_completion_where_rows_have_one_is_no_number():
    """Logits are computed at `rl.max_completion_length` positions of a row."""
    loss, _ = value_and_grad(run_of(), packed(completions(), range(ROWS)), packed=False)
    assert np.isnan(float(loss.mean))


def test_maxima_and_sums_are_of_all_microbatches_and_slices():
    run = run_of(loss_type="dapo")
    batch, rng = dict(completions()), np.random.default_rng(6)
    batch["rollout_logprobs"] = batch.pop("old_logprobs") - rng.normal(0, 0.1, (ROWS, LENGTH)).astype("f4")
    loss, _ = value_and_grad(run, batch)
    optimizer = optax.sgd(0.1)
    for mesh, count in ((None, 4), (make_mesh("data=2,fsdp=2,tensor=2"), 2)):
        step = make_step(
            make_loss_fn(run, MODEL, "cpu", packed=False),
            optimizer,
            optax.constant_schedule(0.1),
            gradient_accumulation_steps=count,
            policy_metrics=metric_names(run),
        )
        with use_mesh(mesh):
            state, _ = init_state(MODEL, optimizer, 0, lj.init(MODEL, jax.random.key(0)))
            _, metrics = jax.jit(step)(state, Feed.for_mesh(mesh, ROWS, LENGTH).put(batch))
        assert_close(metrics.policy, loss.metrics, 1e-5)


def test_a_value_replaces_another_and_keeps_its_gradient():
    value, gradient = jax.value_and_grad(lambda x: 3 * with_value(x**2, jnp.float32(0.1)))(jnp.float32(5))
    assert (float(value), float(gradient)) == (float(3 * jnp.float32(0.1)), 30)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("rl", {"num_generations": 1}, r"rl.num_generations 1; an advantage .* give at least 2"),
        ("rl", {"beta": -0.1}, r"rl.beta is -0.1; it must be a number, at least 0"),
        ("rl", {"num_generations": 3}, r"is not a multiple of rl.num_generations 3; .* set it to 9"),
        ("rl", {"rewards": ()}, r"rl.rewards is not set"),
        ("rl", {"reward_weights": (1.0, 2.0)}, r"rl.reward_weights has 2 numbers and rl.rewards 1 functions"),
        ("rl", {"temperature": 0.0}, r"rl.temperature is 0.0; it must be a number above 0"),
        ("rl", {"max_completion_length": LENGTH}, r"which a prompt and its completion share"),
        ("train", {"quantization": "int8"}, r"which decoding does not compute"),
        ("train", {"objective": "pretrain", "exact_rollouts": True}, r"whose loss has no ratio"),
    ],
)
def test_settings_that_cannot_work_are_refused(section, changes, message):
    run = run_of()

    def change() -> RunConfig:
        changed = dataclasses.replace(getattr(run, section), **changes)
        return dataclasses.replace(run, **{section: changed})

    with pytest.raises(ConfigError, match=message):
        change()
