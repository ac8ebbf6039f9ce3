"""Laws of PPO: values, their clipped loss, advantages from rewards; packed, sharded and adapted models."""

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
from llama_jax.model import hidden_states
from llama_jax.sharding import use_mesh
from llama_jax.train.checkpoints.state_tree import join_state, split_state
from llama_jax.train.config.adapter import AdapterConfig
from llama_jax.train.config.rl import RLConfig
from llama_jax.train.config.run import RunConfig
from llama_jax.train.feed import Feed
from llama_jax.train.network import Network
from llama_jax.train.objectives import make_loss_fn
from llama_jax.train.objectives.common import forward_options
from llama_jax.train.objectives.ppo import clipped_value_loss, token_values
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.rl.critic import add_advantages
from llama_jax.train.state import init_state
from llama_jax.train.trainable import TrainableSpec
from tests.train.test_policy import (
    LENGTH,
    MODEL,
    ROWS,
    assert_close,
    completions,
    logprobs,
    packed,
    params,
    run_of,
)

# Smaller than the policy, with the same vocabulary.
VALUE_MODEL = MODEL.replace(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, labels=("LABEL_0",))
KINDS = ("head", "network")


def ppo_run(**rl: Any) -> RunConfig:
    run = run_of()
    return dataclasses.replace(
        run,
        train=dataclasses.replace(run.train, objective="ppo"),
        rl=dataclasses.replace(run.rl, **rl),
    )


@functools.cache
def policy(kind: str) -> Any:
    if kind == "head":
        kernel = np.asarray(jax.random.normal(jax.random.key(9), (MODEL.hidden_size, 1)))
        return {**params(), "value": {"kernel": kernel}}
    return {**params(), "value": Network(lj.init(VALUE_MODEL, jax.random.key(9)), VALUE_MODEL)}


def values_of(weights: Any, batch: Any) -> jax.Array:
    options = forward_options(ppo_run().train, "cpu")
    hidden = None
    if not isinstance(weights["value"], Network):
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        hidden = hidden_states(MODEL, weights, *inputs)
    return token_values(weights["value"], batch, hidden, options)


@functools.cache
def batch_of(kind: str) -> dict[str, np.ndarray]:
    batch, rng = dict(completions()), np.random.default_rng(5)
    batch["old_values"] = np.asarray(values_of(policy(kind), batch))
    batch["returns"] = rng.normal(size=(ROWS, LENGTH)).astype(np.float32)
    return batch


@functools.cache
def compiled(run: RunConfig) -> Any:
    loss_fn = make_loss_fn(run, MODEL, "cpu")

    def total(weights: Any, batch: Any) -> Any:
        loss = loss_fn(weights, batch)
        return loss.mean, loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def value_and_grad(run: RunConfig, weights: Any, batch: Any) -> tuple[Any, Any]:
    (_, loss), grads = compiled(run)(weights, batch)
    return loss, grads


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_is_reinforce_beside_least_squares(kind):
    """Ratios are 1, nothing is clipped: the gradient is that of -A log p + vf_coef (V - R)^2 / 2."""
    batch, weights = batch_of(kind), policy(kind)
    loss, grads = value_and_grad(ppo_run(vf_coef=0.3), weights, batch)

    def direct(weights: Any) -> jax.Array:
        surrogate = -batch["advantages"] * logprobs(weights, batch)
        squares = (values_of(weights, batch) - batch["returns"]) ** 2 / 2
        return ((surrogate + 0.3 * squares) * batch["mask"]).sum() / batch["mask"].sum()

    assert float(loss.metrics["clip_fraction"]) == float(loss.metrics["value_clip_fraction"]) == 0
    assert_close(grads, jax.jit(jax.grad(direct))(weights), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_is_of_the_state_before_its_token(kind):
    batch = completions()
    before = np.asarray(values_of(policy(kind), batch))
    row = int(batch["mask"].sum(1).argmax())
    place = int(np.flatnonzero(batch["mask"][row])[2])
    tokens = batch["tokens"].copy()
    tokens[row, place] = (tokens[row, place] + 1) % MODEL.vocab_size
    after = np.asarray(values_of(policy(kind), {**batch, "tokens": tokens}))
    changed = np.flatnonzero(np.abs(after - before)[row] > 1e-6)
    assert changed[0] == place + 1


def test_a_value_is_held_where_it_moved_away_from_its_target_too_far():
    old, returns = jnp.zeros(5), jnp.full(5, 1.0)
    values = jnp.array([0.1, 0.5, -0.5, 1.5, 3.0])
    losses, held = clipped_value_loss(values, old, returns, cliprange=0.2)
    np.testing.assert_allclose(losses, jnp.array([0.9, 0.8, 1.5, 0.8, 2.0]) ** 2 / 2, rtol=1e-6)
    assert held.tolist() == [False, True, False, True, False]
    slopes = jax.grad(lambda v: clipped_value_loss(v, old, returns, cliprange=0.2)[0].sum())(values)
    np.testing.assert_allclose(slopes, [-0.9, 0, -1.5, 0, 2.0], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_and_reordered_batch_has_the_same_loss(kind):
    batch, rng = dict(batch_of(kind)), np.random.default_rng(3)
    for name, scale in (("old_logprobs", 0.2), ("old_values", 0.5)):
        batch[name] = batch[name] + rng.normal(0, scale, (ROWS, LENGTH)).astype(np.float32)
    loss, grads = value_and_grad(ppo_run(), policy(kind), batch)
    assert float(loss.metrics["value_clip_fraction"]) > 0 and float(loss.metrics["clip_fraction"]) > 0
    again, other_grads = value_and_grad(ppo_run(), policy(kind), packed(batch, rng.permutation(ROWS)))
    assert_close((loss, grads), (again, other_grads), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_same_on_a_mesh(kind):
    batch = batch_of(kind)
    loss, _ = value_and_grad(ppo_run(), policy(kind), batch)
    mesh = make_mesh("fsdp=4,tensor=1,data=2")
    with use_mesh(mesh):
        weights = lj.init(MODEL, jax.random.key(0))
        value: Any = policy("head")["value"]
        if kind == "network":
            value = Network(lj.init(VALUE_MODEL, jax.random.key(9)), VALUE_MODEL)
        sharded = Feed.for_mesh(mesh, ROWS, LENGTH).put(batch)
        again = jax.jit(make_loss_fn(ppo_run(), MODEL, "cpu"))({**weights, "value": value}, sharded)
    assert_close(loss, again, 1e-4)


def test_without_values_and_penalty_an_advantage_is_the_whitened_reward():
    arrays, scores = dict(completions()), np.random.default_rng(0).normal(3, 2, ROWS)
    mask = arrays["mask"] > 0
    rl = RLConfig(gamma=1.0, gae_lambda=1.0, whiten="none")
    metrics = add_advantages(arrays, scores, np.zeros((ROWS, LENGTH)), None, rl)
    np.testing.assert_allclose(arrays["returns"], np.where(mask, scores[:, None], 0), atol=1e-6)
    spread = np.broadcast_to(scores[:, None], mask.shape)[mask]
    expected = (scores[:, None] - spread.mean()) / spread.std()
    np.testing.assert_allclose(arrays["advantages"], np.where(mask, expected, 0), atol=1e-5)
    assert metrics["explained_variance"] == pytest.approx(0, abs=1e-6) and "kl" not in metrics


def test_values_that_are_the_returns_leave_no_advantage_and_explain_everything():
    arrays, scores = dict(completions()), np.random.default_rng(0).normal(3, 2, ROWS)
    values = np.broadcast_to(scores[:, None], (ROWS, LENGTH))
    rl = RLConfig(gamma=1.0, gae_lambda=0.8, whiten="none")
    metrics = add_advantages(arrays, scores, values, None, rl)
    np.testing.assert_allclose(arrays["advantages"], 0, atol=1e-2)  # of rounding, whitened
    assert metrics["explained_variance"] == pytest.approx(1, abs=1e-6)


def test_whitened_scores_do_not_depend_on_the_scale_of_rewards():
    scores, rng = np.random.default_rng(0).normal(size=ROWS), np.random.default_rng(1)
    reference = completions()["old_logprobs"] + rng.normal(0, 0.3, (ROWS, LENGTH))
    found = []
    for scale in (1.0, 50.0):
        arrays = dict(completions())
        metrics = add_advantages(
            arrays, scale * scores + 7, np.zeros((ROWS, LENGTH)), reference, RLConfig(beta=0.1)
        )
        found.append(arrays["advantages"])
        assert metrics["kl"] > 0
    np.testing.assert_allclose(*found, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_value_function_is_trained_beside_the_policy_and_saved_apart(kind, adapter):
    run = dataclasses.replace(ppo_run(beta=0.1), adapter=AdapterConfig(type=adapter))
    value_model = VALUE_MODEL if kind == "network" else None
    spec = TrainableSpec.from_config(run, "cpu", value_model=value_model)
    optimizer = make_optimizer(run.optimizer, make_schedule(run.optimizer, 10))
    state, frozen = init_state(MODEL, optimizer, 0, None, spec)
    loss_fn = spec.wrap(make_loss_fn(run, MODEL, "cpu"))
    grads = jax.jit(jax.grad(lambda t: loss_fn(t, frozen, batch_of(kind)).total))(state.params)
    assert float(optax.tree.norm(grads["value"])) > 0
    assert float(optax.tree.norm(grads["layers"])) > 0
    if adapter == "lora":
        assert ("value" in frozen) == (kind == "network")
        assert set(state.params) == {"layers", "value"}
    assert "value" not in spec.language_model(state.params, frozen)
    saved, rest = split_state(state)
    assert "value" not in saved and any(name.startswith("value_function.") for name in rest)
    joined = join_state(state, saved, rest)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a is b or bool((a == b).all()), state.params, joined.params)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scale_rewards": "none"},
            r'rl.scale_rewards is "none" and train.objective "ppo"; it applies to "grpo"',
        ),
        ({"gamma": 1.5}, r"rl.gamma is 1.5; it must be at most 1"),
        ({"gae_lambda": -0.1}, r"rl.gae_lambda is -0.1; it must be a number, at least 0"),
        ({"vf_coef": float("nan")}, r"rl.vf_coef is nan"),
        ({"whiten": "score"}, r"rl.whiten is 'score'; did you mean"),
        ({"rewards": ()}, r"rl.rewards is not set"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ppo_run(**changes)


def test_settings_of_ppo_do_not_apply_to_grpo():
    with pytest.raises(
        ConfigError, match=r'rl.vf_coef is 0.5 and train.objective "grpo"; it applies to "ppo"'
    ):
        run_of(vf_coef=0.5)
