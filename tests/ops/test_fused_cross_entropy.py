"""Fused cross-entropy equals autodiff with any number of chunks, on any mesh."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import sharding
from llama_jax.loss import cross_entropy
from llama_jax.meshes import make_mesh
from llama_jax.ops.fused_cross_entropy import fused_cross_entropy
from tests.optimized import optimized
from tests.random_models import random_model

B, T, D, V = 8, 12, 16, 24


def inputs(*, tied, dtype=jnp.float32):
    """Hidden states, parameters with an output projection, targets and unequal weights, some of them 0."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, T, D), np.float32).astype(dtype)
    weight = rng.standard_normal((V, D) if tied else (D, V), np.float32)
    params = {"embed": {"embedding": weight}} if tied else {"lm_head": {"kernel": weight}}
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = np.maximum(rng.standard_normal((B, T), np.float32), 0)
    return x, params, targets, weights


def by_autodiff(x, params, *rest, chunks=1):
    return cross_entropy(x, params, *rest, num_chunks=chunks).total


def by_fused(x, params, *rest, chunks=1):
    return fused_cross_entropy(x, params, *rest, num_chunks=chunks)


@functools.partial(jax.jit, static_argnames=("loss", "chunks"))
def gradient(loss, arguments, z_loss, chunks=1):
    """(value, (d_x, d_params)) of 3 loss: the cotangent is not 1."""
    x, params, *rest = arguments
    run = lambda x, params: 3 * loss(x, params, *rest, jnp.float32(z_loss), chunks=chunks)  # noqa: E731
    return jax.value_and_grad(run, (0, 1))(x, params)


def distance(a, b):
    """|a - b| / |b| over a whole tree."""
    a, b = (np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(x)]) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("chunks", "z_loss"), [(1, 0.0), (5, 0.1), (12, 0.0), (100, 1e-4)])
def test_equals_autodiff_in_value_and_gradient(tied, chunks, z_loss):
    arguments = inputs(tied=tied)
    value, grads = gradient(by_autodiff, arguments, z_loss)
    got_value, got = gradient(by_fused, arguments, z_loss, chunks)
    np.testing.assert_allclose(got_value, value, rtol=1e-6)
    assert distance(got, grads) < 1e-6


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_is_as_accurate_as_autodiff(tied):
    truth_value, truth = gradient(by_autodiff, inputs(tied=tied), 0.01)
    half = inputs(tied=tied, dtype=jnp.bfloat16)
    _, plain = gradient(by_autodiff, half, 0.01)
    value, got = gradient(by_fused, half, 0.01, 5)
    assert got[0].dtype == jnp.bfloat16 and jax.tree.leaves(got[1])[0].dtype == jnp.float32
    np.testing.assert_allclose(value, truth_value, rtol=5e-3)
    assert distance(got, truth) < 1.5 * distance(plain, truth) < 0.02


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spec", ["fsdp=8", "fsdp=4,tensor=2", "data=2,context=2,tensor=2"])
def test_meshes_equal_one_device_and_gradients_stay_sharded(spec, tied):
    arguments = inputs(tied=tied)
    value, grads = gradient(by_fused, arguments, 0.1, 5)
    mesh = make_mesh(spec)
    stored = sharding.EMBEDDING_VD if tied else sharding.HEAD_DV
    specs = (sharding.ACT_BTD, stored, sharding.TOKENS_BT, sharding.TOKENS_BT)
    with jax.set_mesh(mesh):
        leaves, tree = jax.tree.flatten(arguments)
        laid = [jax.device_put(leaf, sharding.named(mesh, s)) for leaf, s in zip(leaves, specs, strict=True)]
        got_value, got = gradient(by_fused, jax.tree.unflatten(tree, laid), 0.1, 5)
    np.testing.assert_allclose(got_value, value, rtol=1e-6)
    expected = [sharding.named(mesh, spec) for spec in specs[:2]]
    assert [g.sharding for g in jax.tree.leaves(got)] == expected
    assert distance(jax.device_get(got), grads) < 1e-6


def test_tokens_of_weight_0_have_no_effect():
    """A target outside the vocabulary may have weight 0; with all weights 0, loss and gradient are 0."""
    x, params, targets, weights = inputs(tied=False)
    hidden = np.where(weights == 0, V + 5, targets)
    for a, b in zip(
        jax.tree.leaves(gradient(by_fused, (x, params, hidden, weights), 0.1)),
        jax.tree.leaves(gradient(by_fused, (x, params, targets, weights), 0.1)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    none = gradient(by_fused, (x, params, targets, 0 * weights), 0.1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(none))


def test_large_logits_do_not_overflow():
    x, params, targets, weights = inputs(tied=False)
    value, grads = gradient(by_fused, (300 * x, params, targets, weights), 0.0)
    expected, theirs = gradient(by_autodiff, (300 * x, params, targets, weights), 0.0)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert distance(grads, theirs) < 1e-5


def test_logits_are_computed_once_and_one_chunk_at_a_time():
    x, params, *rest = inputs(tied=False)

    def program(loss):
        run = jax.value_and_grad(lambda x, p: loss(x, p, *rest, jnp.float32(0), chunks=4), (0, 1))
        return optimized(jax.jit(run).lower(x, params)).as_text()

    fused, plain = program(by_fused), program(by_autodiff)
    products = [len(re.findall(r" dot\(", text)) for text in (fused, plain)]
    assert products[0] == 3 < products[1]  # logits, and two gradients
    assert f"f32[{B},{T},{V}]" not in fused


@functools.partial(jax.jit, static_argnames=("config", "options"))
def loss_and_gradients(config, params, tokens, positions, segments, options):
    def mean(params):
        return lj.next_token_loss(
            config,
            params,
            tokens,
            segments > 0,
            positions,
            segments,
            options=options,
            num_chunks=3,
            z_loss=1e-3,
        ).mean

    return jax.value_and_grad(mean)(params)


CASES = [
    (None, "blockwise", True),
    ("fsdp=4,tensor=2", "blockwise", False),
    ("fsdp=2,context=2,tensor=2", "xla", True),
]


@pytest.mark.parametrize(("spec", "backend", "tied"), CASES)
def test_gradient_of_the_model_equals_autodiff(spec, backend, tied):
    """Packed documents with padding; f32 to rounding, bf16 as accurate as autodiff."""
    config, params = random_model(
        0, lj.presets.TINY.replace(vocab_size=96, hidden_size=32, tie_word_embeddings=tied, head_dim=4)
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 96, (8, 12)).astype(np.int32)
    segments = np.where(np.arange(12) < rng.integers(3, 9, (8, 1)), 1, 2) * (np.arange(12) < 11)
    positions = np.where(segments == 2, np.arange(12) - 3, np.arange(12))

    def run(params=params, **options):
        return loss_and_gradients(
            config, params, tokens, positions, segments, options=lj.ForwardOptions(**options)
        )

    value, truth = run()
    custom = {"custom_vjp": True, "attention_backend": backend}
    if spec is not None:
        mesh = make_mesh(spec)
        with jax.set_mesh(mesh):
            got_value, got = jax.device_get(run(lj.shard_params(params, mesh, config), **custom))
    else:
        got_value, got = run(**custom)
        plain = run(dtype="bfloat16", attention_backend=backend)[1]
        fast = run(dtype="bfloat16", **custom)[1]
        assert distance(fast, truth) < 1.3 * distance(plain, truth)
    np.testing.assert_allclose(got_value, value, rtol=2e-6)
    assert distance(got, truth) < 5e-6
