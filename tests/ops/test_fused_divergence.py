"""Fused divergences equal autodiff of their formulas, for any number of chunks and on any mesh."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import sharding
from llama_jax.meshes import make_mesh
from llama_jax.ops.fused_divergence import Divergence, fused_divergence
from tests.ops.test_fused_cross_entropy import distance
from tests.optimized import optimized

B, T, V = 8, 12, 24
D = {"student": 16, "teacher": 32}  # a teacher may have another width


def inputs(dtype=jnp.float32, *, tied=False, scale=1.0):
    """Hidden states and parameters of student and teacher, and unequal weights, some of them 0."""
    rng = np.random.default_rng(0)
    heads = []
    for which, width in D.items():
        x = scale * rng.standard_normal((B, T, width), np.float32)
        weight = 0.5 * rng.standard_normal((width, V), np.float32)
        transposed = tied == (which == "student")
        params = {"embed": {"embedding": weight.T}} if transposed else {"lm_head": {"kernel": weight}}
        heads.append((x.astype(dtype), params))
    return (*heads, np.maximum(rng.standard_normal((B, T), np.float32), 0))


def logits_of(head):
    x, params = head
    x = x.astype(jnp.float32)
    return x @ (params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T)


def by_formula(divergence, student, teacher, weights, chunks=0):
    """The definition in `Divergence`, by autodiff over all logits; the teacher's k tokens are gathered."""
    q, p = (jax.nn.softmax(logits_of(head) / divergence.temperature) for head in (student, teacher))
    if divergence.top_k:
        ids = jax.lax.top_k(p, divergence.top_k)[1]
        q, p = (jnp.take_along_axis(x, ids, -1) for x in (q, p))
        if divergence.top_k < V:
            q, p = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (q, p))
    kl = lambda a, b: (a * jnp.log(a / b)).sum(-1)  # noqa: E731
    b = divergence.beta
    m = b * p + (1 - b) * q
    values = kl(p, q) if b == 0 else kl(q, p) if b == 1 else b * kl(p, m) + (1 - b) * kl(q, m)
    return (weights * values).sum()


def by_fused(divergence, student, teacher, weights, chunks=1):
    return fused_divergence(divergence, student, teacher, weights, num_chunks=chunks)


@functools.partial(jax.jit, static_argnames=("loss", "divergence", "chunks"))
def gradient(loss, divergence, student, teacher, weights, chunks=1):
    """(value, gradient by the student) of 3 loss: the cotangent is not 1."""
    return jax.value_and_grad(lambda student: 3 * loss(divergence, student, teacher, weights, chunks))(
        student
    )


KINDS = [
    Divergence(0.0),
    Divergence(1.0, temperature=2.0),
    Divergence(0.3, temperature=0.7),
    Divergence(0.0, top_k=1, temperature=2.0),
    Divergence(1.0, top_k=5),
    Divergence(0.5, top_k=7),
    Divergence(0.5, top_k=V),
]
IDS = [f"beta {d.beta:g}, top_k {d.top_k}" for d in KINDS]


@pytest.mark.parametrize("divergence", KINDS, ids=IDS)
def test_equals_autodiff_in_value_and_gradient(divergence):
    for tied, chunks in ((False, 1), (True, 5)):
        arguments = inputs(tied=tied)
        value, grads = gradient(by_formula, divergence, *arguments)
        got_value, got = gradient(by_fused, divergence, *arguments, chunks)
        np.testing.assert_allclose(got_value, value, rtol=2e-5)
        assert distance(got, grads) < 1e-5
        assert value > 1


@pytest.mark.parametrize("spec", ["fsdp=4,tensor=2", "data=2,context=2,tensor=2"])
@pytest.mark.parametrize("divergence", [KINDS[1], KINDS[5], KINDS[6]], ids=[IDS[1], IDS[5], IDS[6]])
def test_meshes_equal_one_device_and_gradients_stay_sharded(divergence, spec):
    arguments = inputs()
    value, grads = gradient(by_fused, divergence, *arguments, 5)
    mesh = make_mesh(spec)
    specs = (sharding.ACT_BTD, sharding.HEAD_DV, sharding.ACT_BTD, sharding.EMBEDDING_VD, sharding.TOKENS_BT)
    with jax.set_mesh(mesh):
        leaves, tree = jax.tree.flatten(arguments)
        laid = [jax.device_put(leaf, sharding.named(mesh, s)) for leaf, s in zip(leaves, specs, strict=True)]
        got_value, got = gradient(by_fused, divergence, *jax.tree.unflatten(tree, laid), 5)
    np.testing.assert_allclose(got_value, value, rtol=1e-6)
    assert [g.sharding for g in jax.tree.leaves(got)] == [sharding.named(mesh, s) for s in specs[:2]]
    assert distance(jax.device_get(got), grads) < 2e-6


def test_of_more_tokens_it_is_larger_and_of_all_it_is_the_whole():
    """Merging outcomes never raises a divergence."""
    for beta in (0.0, 0.4, 1.0):
        of = [float(by_fused(Divergence(beta, top_k=k), *inputs())) for k in (1, 2, 4, 8, 16, V - 1, V, 0)]
        assert all(a < b * (1 + 1e-6) for a, b in itertools.pairwise(of)) and of[0] < 0.9 * of[-1]
        np.testing.assert_allclose(of[-3:], of[-1], rtol=1e-5)


@pytest.mark.parametrize("divergence", KINDS, ids=IDS)
def test_of_a_student_that_is_its_teacher_it_is_zero(divergence):
    _, teacher, weights = inputs()
    value, grads = gradient(by_fused, divergence, teacher, teacher, weights)
    assert abs(value) < 1e-5
    assert all(np.abs(leaf).max() < 1e-5 for leaf in jax.tree.leaves(grads))


def test_of_equal_logits_the_lower_ids_are_the_top_k():
    """Also where a shard has more of them than are taken."""
    student, (x, _), weights = inputs()
    teacher = (x, {"lm_head": {"kernel": np.zeros((D["teacher"], V), np.float32)}})
    divergence = Divergence(0.0, top_k=3)
    expected = gradient(by_formula, divergence, student, teacher, weights)
    mesh = make_mesh("fsdp=4,tensor=2")
    got = [gradient(by_fused, divergence, student, teacher, weights)]
    with jax.set_mesh(mesh):
        got.append(gradient(by_fused, divergence, student, teacher, weights))
    for value, grads in got:
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        assert distance(jax.device_get(grads), expected[1]) < 1e-5


@pytest.mark.parametrize("divergence", KINDS, ids=IDS)
def test_distributions_that_are_far_apart_give_finite_gradients(divergence):
    value, grads = gradient(by_fused, divergence, *inputs(scale=300.0))
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_bf16_is_as_accurate_as_autodiff():
    divergence = Divergence(0.5)
    truth_value, truth = gradient(by_formula, divergence, *inputs())
    value, got = gradient(by_fused, divergence, *inputs(jnp.bfloat16), 5)
    assert got[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(value, truth_value, rtol=1e-2)
    assert distance(got, truth) < 0.02


def test_logits_are_computed_once_and_one_chunk_at_a_time():
    student, teacher, weights = inputs()
    run = lambda student: by_fused(Divergence(0.5), student, teacher, weights, chunks=4)  # noqa: E731
    text = optimized(jax.jit(jax.value_and_grad(run)).lower(student)).as_text()
    assert len(re.findall(r" dot\(", text)) == 4  # the logits of both, and two gradients
    assert f"f32[{B},{T},{V}]" not in text
