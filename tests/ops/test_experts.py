"""The experts' layer: against a loop over tokens, with values and gradients; grouping; capacity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.errors import ConfigError
from llama_jax.forward_options import ForwardOptions
from llama_jax.ops.experts import experts, route, router_logits
from llama_jax.ops.grouped import choose_block_size, group_rows
from llama_jax.ops.swiglu import swiglu

E, D, F, TOP = 4, 16, 24, 2
SHAPES = [(1, 1), (2, 7), (4, 33)]  # blocks of one row, of a few with padding, of many


def inputs(batch, length, scale=0.3):
    keys = jax.random.split(jax.random.key(batch), 5)
    shapes = (batch, length, D), (D, E), (E, D, F), (E, D, F), (E, F, D)
    x, *weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return x, weights[0], *(scale * weight for weight in weights[1:])


@functools.partial(jax.jit, static_argnames=("capacity_factor", "custom_vjp"))
def layer(x, router, *weights, **kwargs):
    return experts(x, router_logits(x, router), *weights, num_experts_per_tok=TOP, **kwargs)


@jax.jit
def loop(x, router, w_gate, w_up, w_down):
    """Token by token: softmax over all experts, the largest, divided by their sum (Mixtral's code)."""
    values, ids = jax.lax.top_k(jax.nn.softmax(x @ router, axis=-1), TOP)
    values /= values.sum(-1, keepdims=True)

    def token(x, values, ids):
        return sum(
            value * (swiglu(x @ w_gate[e], x @ w_up[e]) @ w_down[e])
            for value, e in zip(values, ids, strict=True)
        )

    return jax.vmap(jax.vmap(token))(x, values, ids)


@functools.partial(jax.jit, static_argnums=0)
def value_and_grads(function, *args):
    def total(*args):
        y = function(*args)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

    return jax.value_and_grad(total, argnums=tuple(range(len(args))), has_aux=True)(*args)


@pytest.mark.parametrize("custom_vjp", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_a_loop_over_tokens(shape, custom_vjp):
    args = inputs(*shape)
    (_, y), grads = value_and_grads(functools.partial(layer, custom_vjp=custom_vjp), *args)
    (_, expected), expected_grads = value_and_grads(loop, *args)
    np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max())
    for one, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6 * np.abs(other).max())


def test_one_token_that_all_rows_choose_loses_nothing():
    x, router, *weights = inputs(4, 33)
    router = router.at[:, 1].set(0).at[0, 1].set(1e3)  # all of them, or all others
    x = x.at[..., 0].set(1.0)
    np.testing.assert_allclose(
        layer(x, router, *weights), loop(x, router, *weights), atol=2e-6 * np.abs(x).max()
    )


def test_permuting_the_experts_with_the_routers_columns_changes_nothing():
    x, router, *weights = inputs(2, 7)
    order = np.array([2, 0, 3, 1])
    permuted = layer(x, router[:, order], *(weight[order] for weight in weights))
    np.testing.assert_allclose(permuted, layer(x, router, *weights), atol=1e-6)


def test_one_expert_is_a_feed_forward_layer():
    x, router, *weights = inputs(2, 7)
    w_gate, w_up, w_down = (weight[:1] for weight in weights)
    y = experts(x, router_logits(x, router[:, :1]), w_gate, w_up, w_down, num_experts_per_tok=1)
    np.testing.assert_allclose(y, swiglu(x @ w_gate[0], x @ w_up[0]) @ w_down[0], atol=1e-5)


def test_a_forward_mode_derivative_is_that_of_the_loop():
    x, *weights = inputs(2, 7)
    tangent = jnp.ones_like(x)
    _, found = jax.jvp(lambda x: layer(x, *weights), (x,), (tangent,))
    _, expected = jax.jvp(lambda x: loop(x, *weights), (x,), (tangent,))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bf16_differs_from_f32_by_its_rounding_alone():
    x, router, *weights = inputs(4, 33)
    x = x.astype(jnp.bfloat16)
    logits = router_logits(x, router)
    assert logits.dtype == jnp.float32
    run = functools.partial(value_and_grads, lambda x, *w: experts(x, logits, *w, num_experts_per_tok=TOP))
    (_, y), grads = value_and_grads(
        lambda x, *w: experts(x, logits, *w, num_experts_per_tok=TOP, custom_vjp=True), x, *weights
    )
    (_, expected), expected_grads = run(x.astype(jnp.float32), *weights)
    assert y.dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    for one, other in zip((y, *grads), (expected, *expected_grads), strict=True):
        difference = np.abs(np.asarray(one, np.float32) - other).max()
        assert difference < 0.03 * np.abs(other).max()


@pytest.mark.parametrize("rows", [1, 9, 200])
def test_every_row_has_one_place_in_a_block_of_its_expert(rows):
    ids = jax.random.randint(jax.random.key(rows), (rows,), 0, E + 1)  # E: left out
    groups, source, place = group_rows(ids, E)
    size = groups.block_size
    assert size == choose_block_size(rows, E)
    kept = np.flatnonzero(ids < E)
    assert sorted(np.asarray(source)[np.asarray(source) < rows]) == list(kept)
    np.testing.assert_array_equal(source[place[kept]], kept)
    np.testing.assert_array_equal(groups.experts[place[kept] // size], ids[kept])
    assert groups.is_live[place[kept] // size].all()
    for e in range(E):  # stable: in their order within an expert
        assert (np.diff(np.asarray(place)[np.asarray(ids) == e]) > 0).all()
    assert (np.asarray(place)[np.asarray(ids) == E] == source.size).all()
    blocks = -(-np.bincount(ids, minlength=E + 1)[:E] // size)
    np.testing.assert_array_equal(groups.sizes, blocks * size)
    assert int(groups.is_live.sum()) == blocks.sum()


def test_a_capacity_that_all_tokens_fit_in_is_dropless():
    args = inputs(2, 7)
    whole, everything = layer(*args), layer(*args, capacity_factor=E / TOP)
    np.testing.assert_allclose(everything, whole, atol=1e-5)


def test_above_the_capacity_the_last_tokens_are_dropped_second_choices_first():
    x, router, *weights = inputs(1, 8)
    router = jnp.zeros_like(router).at[0, 0].set(2.0).at[0, 1].set(1.0)
    x = x.at[..., 0].set(1.0)  # all choose expert 0 first and 1 second
    y = layer(x, router, *weights, capacity_factor=1.0)  # four tokens per expert
    whole = layer(x, router, *weights)
    np.testing.assert_allclose(y[:, :4], whole[:, :4], atol=1e-5)
    np.testing.assert_array_equal(y[:, 4:], 0)
    swapped = x.at[:, :4, 0].set(-1.0)  # the first four choose 2 and 3, whose logits are 0
    kept = layer(swapped, router, *weights, capacity_factor=1.0)
    np.testing.assert_allclose(kept, layer(swapped, router, *weights), atol=1e-5)


def test_route_is_softmax_over_the_chosen():
    logits = jnp.array([[0.0, 3.0, 1.0, 2.0]])
    weights, ids = route(logits, 2)
    assert ids.tolist() == [[1, 3]]
    np.testing.assert_allclose(weights[0], jax.nn.softmax(jnp.array([3.0, 2.0])), rtol=1e-6)


@pytest.mark.parametrize("capacity", [0, -1.0, float("inf")])
def test_an_invalid_capacity_is_one_line(capacity):
    with pytest.raises(ConfigError, match=r"expert_capacity is .*; it must be a number above 0"):
        ForwardOptions(expert_capacity=capacity)
