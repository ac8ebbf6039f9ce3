"""Learning-rate schedules, optimizers against their papers' formulas, and the settings of each."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
import optax
import pytest

import llama_jax as lj
from llama_jax.adapters import bottleneck
from llama_jax.errors import ConfigError
from llama_jax.train.config.run import OptimizerConfig
from llama_jax.train.optimizer import make_optimizer, make_schedule, weight_decay_mask
from llama_jax.train.trainable import frozen_mask

MODEL = lj.LlamaConfig(
    vocab_size=24, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, head_dim=4
)
PARAMS = jax.tree.map(lambda p: p + np.float32(0.1), jax.device_get(lj.init(MODEL, jax.random.key(0))))
# A matrix and a norm scale, whose updates compile fast.
FEW = {
    "layers": {"attention": {"wo": PARAMS["layers"]["attention"]["wo"]}},
    "final_norm": PARAMS["final_norm"],
}
NAMES = ("adamw", "muon", "lion", "adafactor")


def rates(steps: int, **config) -> np.ndarray:
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **config), steps)
    return np.array([schedule(step) for step in range(steps + 1)])


def test_biases_have_no_weight_decay():
    adapter = bottleneck.init(bottleneck.Bottleneck(4), PARAMS, jax.random.key(0))["layers"]["attention"]
    assert weight_decay_mask(adapter) == {"down": True, "down_bias": False, "up": True, "up_bias": False}


def test_warmup_is_linear_from_the_first_step_to_the_peak():
    for schedule in ("cosine", "wsd", "constant"):
        np.testing.assert_allclose(
            rates(40, schedule=schedule, warmup_steps=8)[:9], [*np.arange(1, 9) / 4, 2.0], rtol=1e-6
        )


def test_cosine_at_its_midpoint_and_end():
    values = rates(110, warmup_steps=10)
    assert values.max() == values[9] == values[10] == 2.0
    np.testing.assert_allclose(values[60], 2.0 * (1 + 0.1) / 2, rtol=1e-6)
    np.testing.assert_allclose(values[110], 0.2, rtol=1e-6)
    by_hand = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * t / 100)) / 2) for t in range(101)]
    np.testing.assert_allclose(values[10:], by_hand, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_with_schedule_steps_a_short_run_has_the_rates_of_a_long_one(schedule):
    long = rates(40, schedule=schedule, warmup_steps=30)
    np.testing.assert_array_equal(
        rates(20, schedule=schedule, warmup_steps=30, schedule_steps=40)[:20], long[:20]
    )
    assert (rates(20, schedule=schedule, warmup_steps=30)[:20] != long[:20]).any()


def test_wsd_is_constant_and_then_decays_linearly():
    values = rates(100, schedule="wsd", warmup_steps=10, decay_fraction=0.2, min_lr_ratio=0.0)
    assert (values[10:81] == 2.0).all()
    np.testing.assert_allclose(values[80:], 2.0 * np.arange(20, -1, -1) / 20, atol=1e-6)


def test_constant():
    assert (rates(30, schedule="constant", warmup_steps=3)[2:] == 2.0).all()
    assert (rates(3, schedule="constant", warmup_steps=0) == 2.0).all()


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 2000), (3, 2000), (2, 1), (5, 5), (1, 0)])
def test_short_runs_have_finite_rates_and_reach_the_peak(schedule, steps, warmup):
    values = rates(steps, schedule=schedule, warmup_steps=warmup)[:steps]
    assert np.isfinite(values).all() and (values > 0).all() and values.max() == 2.0


def gradient(seed: int, params=PARAMS):
    return jax.tree.map(
        lambda p: np.float32(np.random.default_rng([seed, p.size]).normal(size=p.shape)), params
    )


def run(config: OptimizerConfig, steps: int = 3, gradients=lambda step, _: gradient(step), initial=PARAMS):
    """The parameters after `steps` updates; a gradient depends on the step and the parameters."""
    optimizer = make_optimizer(config, make_schedule(config, steps))

    @jax.jit
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = initial, optimizer.init(initial)
    for step in range(steps):
        params, state = update(gradients(step, params), state, params)
    return jax.device_get(params)


def test_adamw_matches_the_paper():
    """Decoupled weight decay, arXiv 1711.05101, algorithm 2, in numpy; none on norm scales."""
    config = OptimizerConfig(learning_rate=0.03, warmup_steps=2)
    got, schedule = run(config), make_schedule(config, 3)

    def by_hand(path, p, decay):
        p, m, v = np.float64(p), 0.0, 0.0
        for t in range(3):
            g = np.float64(functools.reduce(lambda tree, key: tree[key.key], path, gradient(t)))
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            step = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.95 ** (t + 1))) + 1e-5)
            p = p - float(schedule(t)) * (step + 0.1 * decay * p)
        return p

    expected = jax.tree_util.tree_map_with_path(by_hand, PARAMS, weight_decay_mask(PARAMS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7), got, expected)


def test_lion_matches_the_paper():
    """arXiv 2302.06675, algorithm 2."""
    config = OptimizerConfig(name="lion", learning_rate=0.01, warmup_steps=0, schedule="constant")
    got = run(config)["layers"]["attention"]["wo"]
    p, m = np.float64(PARAMS["layers"]["attention"]["wo"]), 0.0
    for t in range(3):
        g = np.float64(gradient(t)["layers"]["attention"]["wo"])
        p = p - 0.01 * (np.sign(0.9 * m + 0.1 * g) + 0.1 * p)
        m = 0.95 * m + 0.05 * g
    np.testing.assert_allclose(got, p, rtol=1e-5)


def test_muon_updates_are_near_orthogonal_with_adamw_rms():
    config = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
    new = run(config, steps=1)
    for name, shape in (("wq", (8, 8)), ("wo", (8, 8))):
        update = np.asarray(new["layers"]["attention"][name] - PARAMS["layers"]["attention"][name])
        for layer in update.reshape(2, *shape):
            singular = np.linalg.svd(layer, compute_uv=False) / (0.2 * math.sqrt(8))
            assert (singular > 0.3).all() and (singular < 1.6).all(), name
    up = new["layers"]["feed_forward"]["w_up"] - PARAMS["layers"]["feed_forward"]["w_up"]
    assert 0.1 < np.sqrt(np.mean(up**2)) < 0.3
    # Embedding, output projection and norms are Adam's, every entry's first step alike: one, and with
    # Nesterov's look ahead (b1 m + (1 - b1) g) at their second step's correction of m.
    first = 0.1 / 0.1 + 0.9 * 0.1 / (1 - 0.9**2)
    for leaf in (new["embed"]["embedding"] - PARAMS["embed"]["embedding"], new["final_norm"]["scale"] - 1.1):
        np.testing.assert_allclose(np.abs(leaf), first, rtol=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_applies_to_matrices_and_not_to_norm_scales(name):
    """Without a gradient the update is learning rate x weight decay for every optimizer."""
    config = OptimizerConfig(
        name=name, learning_rate=0.5, warmup_steps=0, schedule="constant", weight_decay=0.2
    )
    got = run(config, 1, gradients=lambda *_: jax.tree.map(np.zeros_like, PARAMS))

    def check(path, new, old):
        kept = 1.0 if "norm" in jax.tree_util.keystr(path) else 1 - 0.5 * 0.2
        np.testing.assert_allclose(new, kept * old, rtol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, got, PARAMS)


SETTINGS = {
    "adamw": ("learning_rate", "b1", "b2", "eps", "weight_decay", "schedule"),
    "muon": ("learning_rate", "b1", "b2", "eps", "weight_decay", "schedule"),
    "lion": ("learning_rate", "b1", "b2", "weight_decay", "schedule"),
    "adafactor": ("learning_rate", "weight_decay", "schedule"),
}
OTHER = {"learning_rate": 0.02, "b1": 0.5, "b2": 0.6, "eps": 0.5, "weight_decay": 0.5, "schedule": "constant"}


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_affects_its_optimizer(name):
    config = OptimizerConfig(name=name, learning_rate=0.01, warmup_steps=0)
    of_few = {"gradients": lambda step, _: gradient(step, FEW), "initial": FEW}
    base = run(config, **of_few)
    for setting in SETTINGS[name]:
        other = run(dataclasses.replace(config, **{setting: OTHER[setting]}), **of_few)
        same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-6), base, other)
        assert not all(jax.tree.leaves(same)), setting


@jax.jit
def loss_and_gradient(params):
    tokens = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    return jax.value_and_grad(lambda p: lj.next_token_loss(MODEL, p, tokens).mean)(params)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_fits_a_small_model(name):
    """A small Llama memorizes a text; norms and embeddings are updated too."""
    rate = 0.2 if name == "adafactor" else 0.02  # relative to the RMS of the parameter
    config = OptimizerConfig(name=name, learning_rate=rate, warmup_steps=5)
    losses = []

    def gradients(step, params):
        loss, grads = loss_and_gradient(params)
        losses.append(float(loss))
        return grads

    params = run(config, 40, gradients)
    assert losses[0] > 3 and losses[-1] < losses[0] - 1
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, PARAMS)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_do_not_change_and_have_no_moments(name):
    freeze = ("embed.*", "layers.attention.w[kv]", "*norm*")
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=0, freeze=freeze)
    rule = make_optimizer(config, make_schedule(config, 10))
    grads = jax.tree.map(np.ones_like, PARAMS)
    updates = jax.device_get(jax.jit(lambda g, p: rule.update(g, rule.init(p), p)[0])(grads, PARAMS))
    mask = frozen_mask(config, PARAMS)
    assert sum(jax.tree.leaves(mask)) == 6
    jax.tree.map(lambda u, keep: np.testing.assert_equal(bool((u == 0).all()), keep), updates, mask)
    whole = make_optimizer(dataclasses.replace(config, freeze=()), make_schedule(config, 10))
    sizes = [
        sum(x.size for x in jax.tree.leaves(jax.eval_shape(optimizer.init, PARAMS)))
        for optimizer in (rule, whole)
    ]
    assert sizes[0] < sizes[1]


def test_layer_decay_scales_updates_by_depth():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, layer_decay=0.5, weight_decay=0.0)
    flat = dataclasses.replace(config, layer_decay=1.0)
    grads = jax.tree.map(np.ones_like, PARAMS)
    rules = [make_optimizer(c, make_schedule(c, 10)) for c in (config, flat)]
    moved, even = jax.device_get(
        jax.jit(lambda g, p: [rule.update(g, rule.init(p), p)[0] for rule in rules])(grads, PARAMS)
    )
    ratio = jax.tree.map(lambda a, b: a / b, moved, even)
    np.testing.assert_allclose(ratio["embed"]["embedding"], 0.25)
    for leaf in jax.tree.leaves(ratio["layers"]):
        np.testing.assert_allclose(leaf[0], 0.5)
        np.testing.assert_allclose(leaf[1], 1.0)
    np.testing.assert_allclose(ratio["final_norm"]["scale"], 1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"freeze": ("embed.*", "layers.wq")},
            r"'layers\.wq' matches no parameter \(there are embed\.embedding",
        ),
        ({"freeze": ("*",)}, "leaves nothing to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_errors(settings, message):
    config = OptimizerConfig(**settings)
    with pytest.raises(ConfigError, match=message):
        make_optimizer(config, make_schedule(config, 10)).init(PARAMS)
    with pytest.raises(ConfigError, match=r"layer_decay is 0"):
        OptimizerConfig(layer_decay=0)
