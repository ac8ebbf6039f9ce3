"""The model: cached = uncached, packed = separate, remat and unstacking have no effect; ForwardOptions."""

from __future__ import annotations

import dataclasses
import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import kv_cache as kv
from llama_jax import model
from llama_jax.errors import ConfigError, InputError
from llama_jax.layers import embed
from llama_jax.model import forward_cached
from llama_jax.ops.remat import Remat
from tests.random_models import random_model, random_prompts

# Every kind of RoPE scaling; groups of 1, 2 and 3 heads; 1 to 3 layers; tied or not.
SEEDS = (0, 5, 8, 11, 12)
jit_forward_cached = jax.jit(forward_cached, static_argnums=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_cached_is_uncached_at_every_position(seed):
    config, params = random_model(seed)
    tokens, _ = random_prompts(seed, config, [14, 14])
    expected = lj.forward(config, params, tokens)
    scale = np.abs(expected).max()
    weights = lj.unstack(jax.device_get(params))
    cache = kv.init_cache(config, 2, 20, jnp.float32)
    pieces = []
    for at in range(14):
        now, start = tokens[:, at : at + 1], np.full(2, at, np.int32)
        logits, cache = jit_forward_cached(config, weights, now, start, cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1) / scale, np.asarray(expected) / scale, atol=2e-6)


def test_batch_rows_may_be_at_different_cache_slots():
    """After a prefill; tokens are read two at a time."""
    config, params = random_model(8)
    tokens, _ = random_prompts(7, config, [12, 12])
    expected = np.asarray(lj.forward(config, params, tokens))
    weights = lj.unstack(jax.device_get(params))
    cache = kv.init_cache(config, 2, 16, jnp.float32)
    prefill, cache = jit_forward_cached(config, weights, tokens[:, :10], np.zeros(2, np.int32), cache)
    np.testing.assert_allclose(prefill, expected[:, :10], atol=2e-5)
    start = np.array([10, 4], np.int32)  # row 1 overwrites earlier slots
    now = np.stack([tokens[0, 10:12], tokens[1, 4:6]])
    logits, _ = jit_forward_cached(config, weights, now, start, cache)
    np.testing.assert_allclose(logits, np.stack([expected[0, 10:12], expected[1, 4:6]]), atol=2e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_packed_documents_are_separate_documents(seed):
    config, params = random_model(seed)
    (a, b), _ = random_prompts(seed, config, [9, 9])
    packed = np.concatenate([a, b])[None]
    positions = np.concatenate([np.arange(9), np.arange(9)])[None]
    segments = np.repeat([0, 1], 9)[None]
    together = np.asarray(lj.forward(config, params, packed, positions, segments))[0]
    alone = np.asarray(lj.forward(config, params, np.stack([a, b]))).reshape(18, -1)
    np.testing.assert_allclose(together, alone, atol=2e-6 * float(np.abs(alone).max()))


@functools.partial(jax.jit, static_argnums=(0, 3))
def mean_and_gradients(config, params, tokens, options):
    mean = lambda params: jnp.square(lj.forward(config, params, tokens, options=options)).mean()  # noqa: E731
    return jax.value_and_grad(mean)(params)


def assert_same_gradients(got, expected):
    (value, grads), (expected_value, expected_grads) = got, expected
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected_grads))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale), grads, expected_grads)


@pytest.mark.parametrize(
    ("remat", "backend"),
    [
        ("save_dots", "xla"),
        ("save_projections", "xla"),
        ("full", "xla"),
        ("none", "blockwise"),
        ("save_dots_except_mlp", "blockwise"),
        ("attention", "blockwise"),
    ],
)
def test_remat_and_backend_have_no_effect(remat, backend):
    config, params = random_model(8)
    tokens, _ = random_prompts(3, config, [12, 12])
    expected = mean_and_gradients(config, params, tokens, lj.ForwardOptions())
    options = lj.ForwardOptions(remat=remat, attention_backend=backend)
    assert_same_gradients(mean_and_gradients(config, params, tokens, options), expected)


@pytest.mark.parametrize(
    ("remat", "backend"),
    [("none", "xla"), ("save_projections", "blockwise"), ("attention", "xla"), ("full", "blockwise")],
)
def test_unstacking_has_no_effect(remat, backend):
    """Nor have the policies that the test above leaves out."""
    config, params = random_model(8)
    tokens, _ = random_prompts(3, config, [12, 12])
    value, grads = mean_and_gradients(config, params, tokens, lj.ForwardOptions())
    options = lj.ForwardOptions(remat=remat, attention_backend=backend)
    got = mean_and_gradients(config, lj.unstack(params), tokens, options)
    assert_same_gradients(got, (value, lj.unstack(grads)))


@pytest.mark.parametrize("policy", ["none", "full"])
def test_full_remat_recomputes_the_forward_pass(policy):
    """The policy reaches the program: `full` has a remat call, `none` has not."""
    config, params = random_model(2)
    tokens, _ = random_prompts(2, config, [16])
    mean = lambda p: lj.forward(config, p, tokens, remat=policy).mean()  # noqa: E731
    jaxpr = str(jax.make_jaxpr(jax.grad(mean))(params))
    assert ("remat" in jaxpr or "checkpoint" in jaxpr) == (policy == "full")


def test_remat_policies_recompute_what_they_say():
    """The products of a layer in the backward pass, beside those where everything is saved."""
    config, params = random_model(2)
    tokens, _ = random_prompts(2, config, [16])

    def products(policy):
        options = lj.ForwardOptions(remat=policy, attention_backend="blockwise", custom_vjp=True)
        mean = lambda p: lj.forward(config, p, tokens, options=options).mean()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(mean))(params)).count("dot_general[")

    saved = products("none")
    recomputed = {policy: products(policy) - saved for policy in get_args(Remat)}
    assert recomputed["save_dots"] == 0
    assert recomputed["save_projections"] == recomputed["offload"] == 2  # v and wo
    assert recomputed["save_dots_except_mlp"] == 2  # w_gate and w_up
    assert recomputed["attention"] == 8  # besides these, q, k and their rotation
    assert recomputed["full"] > recomputed["attention"]


def test_init_is_as_documented():
    config = lj.presets.TINY
    params = lj.init(config, jax.random.key(0), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    attention = params["layers"]["attention"]
    assert attention["wq"].shape == (2, 64, 8, 8) and attention["wk"].shape == (2, 64, 4, 8)
    assert float(np.std(np.float32(attention["wq"]))) == pytest.approx(0.02, rel=0.05)
    assert float(np.std(np.float32(attention["wo"]))) == pytest.approx(0.01, rel=0.05)
    first, second = np.asarray(attention["wq"])
    assert not np.array_equal(first, second)
    assert float(np.min(params["final_norm"]["scale"])) == 1.0
    tied = config.replace(tie_word_embeddings=True)
    assert "lm_head" in params
    assert "lm_head" not in jax.eval_shape(lambda: lj.init(tied, jax.random.key(0)))


def test_bf16_compute_keeps_logits_f32_and_close():
    config, params = random_model(5)
    tokens, _ = random_prompts(4, config, [12])
    exact = lj.forward(config, params, tokens)
    logits = lj.forward(config, params, tokens, dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    assert float(np.abs(logits - exact).max() / np.abs(exact).max()) < 0.05


def test_composes_with_vmap_for_per_example_gradients():
    config, params = random_model(5)
    tokens, _ = random_prompts(5, config, [10, 10, 10])
    one = lambda p, row: lj.forward(config, p, row[None]).mean()  # noqa: E731
    each = jax.jit(jax.vmap(jax.grad(one), (None, 0)))(params, tokens)
    alone = jax.jit(jax.grad(one))(params, tokens[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a)[1], b, atol=1e-6), each, alone)


def test_unknown_remat_policy_is_an_error():
    config, params = random_model(0)
    with pytest.raises(
        ConfigError,
        match="remat policy 'some' is unknown; use one of none, save_dots, save_projections, "
        "save_dots_except_mlp, attention, full",
    ):
        lj.forward(config, params, np.zeros((1, 2), np.int32), remat="some")


@pytest.mark.parametrize(
    ("error", "change", "message"),
    [
        (
            InputError,
            {"tokens": np.zeros(3, np.int32)},
            "tokens is int32 of shape (3,); it must be an integer array",
        ),
        (InputError, {"tokens": np.zeros((1, 3))}, "tokens is float"),
        (
            InputError,
            {"positions": np.zeros((1, 4), np.int32)},
            "positions has shape (1, 4); tokens has (1, 3)",
        ),
        (InputError, {"segment_ids": np.zeros(3, np.int32)}, "segment_ids has shape (3,); tokens has (1, 3)"),
        (ConfigError, {"layers": 7}, "another model: 2 layers and"),
        (ConfigError, {"vocab": 300}, "vocab_size 300"),
    ],
)
def test_mismatched_arguments_are_errors(error, change, message):
    config, params = random_model(0, lj.presets.TINY)
    config = config.replace(
        num_hidden_layers=change.pop("layers", 2), vocab_size=change.pop("vocab", config.vocab_size)
    )
    arguments = {"tokens": np.zeros((1, 3), np.int32)} | change
    with pytest.raises(error) as raised:
        lj.forward(config, params, **arguments)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_id_outside_the_vocabulary_has_a_nan_embedding():
    rows = embed(jnp.ones((5, 3)), jnp.array([[4, 5, -1, -100]]), dtype=jnp.float32)
    np.testing.assert_array_equal(np.isnan(rows[0, :, 0]), [False, True, True, True])


def test_parameters_may_be_numpy_arrays():
    config, params = random_model(0)
    tokens, _ = random_prompts(0, config, [5])
    np.testing.assert_array_equal(
        lj.forward(config, jax.tree.map(np.asarray, params), tokens), lj.forward(config, params, tokens)
    )


def test_equal_options_share_one_compiled_program():
    config, params = random_model(0)
    tokens, _ = random_prompts(0, config, [7])
    before = model._forward._cache_size()
    for options in (
        {"options": lj.ForwardOptions(dtype="bfloat16", remat="full")},
        {"options": lj.ForwardOptions(dtype=jnp.bfloat16, remat="full")},
        {"dtype": jnp.dtype("bfloat16"), "remat": "full"},
        {"options": lj.ForwardOptions(remat="full"), "dtype": "bfloat16"},
    ):
        lj.forward(config, params, tokens, **options)
    assert model._forward._cache_size() == before + 1


def test_options_are_frozen_and_hashable():
    options = lj.ForwardOptions(dtype=jnp.bfloat16)
    assert options == lj.ForwardOptions(dtype="bfloat16")
    assert hash(options) == hash(lj.ForwardOptions(dtype="bfloat16"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.remat = "full"


def test_override_replaces_what_is_not_none():
    options = lj.ForwardOptions(dtype="bfloat16", custom_vjp=True)
    assert options.override(dtype=None, remat=None, custom_vjp=None) == options
    changed = options.override(dtype="float32", custom_vjp=False, attention_backend="blockwise")
    assert changed == lj.ForwardOptions(dtype="float32", attention_backend="blockwise")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_backend": "flash"}, "attention backend 'flash' is unknown; use one of xla, blockwise, "),
        ({"remat": "some"}, "remat policy 'some' is unknown; use one of none, save_dots, save_projections,"),
        ({"dtype": "brain"}, "compute dtype is 'brain'; it must be a float dtype"),
        ({"dtype": "int8"}, "compute dtype is 'int8'; it must be a float dtype"),
        ({"custom_vjp": "fast"}, "custom_vjp is 'fast'; it must be True or False"),
    ],
)
def test_invalid_options_are_errors(changes, message):
    for make in (lambda: lj.ForwardOptions(**changes), lambda: lj.ForwardOptions().override(**changes)):
        with pytest.raises(ConfigError) as error:
            make()
        assert str(error.value).startswith(message) and "\n" not in str(error.value)
