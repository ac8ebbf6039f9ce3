"""Products in eight bits: exactly those of quantized operands, forward and backward, near those in f32."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import adapters, meshes, sharding
from llama_jax.errors import ConfigError
from llama_jax.ops import eight_bits
from llama_jax.ops.eight_bit_operands import Operand, product, quantize
from llama_jax.ops.eight_bits import EightBitWeight, eight_bit_products

F32 = jnp.float32
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
DTYPES = {"int8": ("int8", "int8"), "fp8": ("float8_e4m3fn", "float8_e5m2")}
KEY = jax.random.key(5)
CONFIG = lj.presets.TINY
PARAMS = lj.init(CONFIG, jax.random.key(0))
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 16))
EQUATIONS = [
    ("btd,df->btf", (2, 5, 24), (24, 10), sharding.GATE_UP_DF, sharding.ACT_BTF),
    ("btd,dnh->btnh", (2, 5, 24), (24, 2, 6), sharding.WQ_DNH, sharding.ACT_BTNH),
    ("btnh,nhd->btd", (2, 5, 4, 6), (4, 6, 10), sharding.WO_NHD, sharding.ACT_BTD),
]


def draw(seed, *shape):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(rng.normal(size=shape))).astype(np.float32)


def rounded(x, axes, dtype):
    """numpy: x in steps of f32 [values, scale]; the values are numbers of `dtype`."""
    top = np.abs(x).max(axis=axes, keepdims=True)
    steps = x * (np.float32(LARGEST[dtype]) / top)
    values = np.round(steps) if dtype == "int8" else steps.astype(getattr(ml_dtypes, dtype))
    return values.astype(np.float64), top.astype(np.float64) / LARGEST[dtype]


@pytest.mark.parametrize("dtype", list(LARGEST))
def test_quantized_values_are_within_half_a_step(dtype):
    x = draw(0, 64, 33)
    x[3] = 0
    values, scale = jax.jit(functools.partial(quantize, axes=(1,), dtype=jnp.dtype(dtype)))(x)
    assert values.dtype == dtype and scale.shape == (64, 1)
    found = np.float64(values) * np.float64(scale)
    relative = {"int8": 0.0, "float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}[dtype]
    smallest = {"int8": 0.5, "float8_e4m3fn": 2.0**-10, "float8_e5m2": 2.0**-17}[dtype]
    assert (np.abs(found - x) <= (1 + 1e-6) * np.maximum(relative * np.abs(x), smallest * scale)).all()
    assert (np.abs(np.float64(values)).max(1) == LARGEST[dtype])[np.arange(64) != 3].all()
    assert not found[3].any()


def linear(equation, weight_spec, out_spec, kind, scales="channel"):
    def run(x, w):
        weight = EightBitWeight(w, None, kind, scales)
        return eight_bits.project([(equation, weight, weight_spec)], x, out_spec)[0]

    return run


@pytest.mark.parametrize("scales", ["channel", "tensor"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("case", EQUATIONS, ids=lambda case: case[0])
def test_products_and_gradients_are_those_of_quantized_operands(case, kind, scales):
    """The formulas of the module's docstring, in numpy; and near the products of f32."""
    equation, x_shape, w_shape, *specs = case
    left, right, result = re.split("->|,", equation)
    x, w, run = draw(1, *x_shape), draw(2, *w_shape), linear(equation, *specs, kind, scales)
    y, back = jax.vjp(run, x, w)
    d_y = draw(3, *y.shape)
    d_x, d_w = back(d_y)

    of_value, of_gradient = DTYPES[kind]
    whole = scales == "tensor"
    inside_x = tuple(i for i, letter in enumerate(left) if whole or letter not in result)
    inside_w = tuple(i for i, letter in enumerate(right) if whole or letter not in result)
    (x8, s_x), (w8, s_w) = rounded(x, inside_x, of_value), rounded(w, inside_w, of_value)
    expected = np.einsum(equation, x8 * s_x, w8 * s_w)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    outputs = tuple(range(2, len(result)))
    s_out = s_w.reshape(1, 1, *w_shape[1:]) if outputs == (2, 3) and not whole else s_w.reshape(1, 1, -1)
    s_out = s_out.reshape(*s_out.shape, *(1,) * (len(result) - s_out.ndim))
    everything = tuple(range(len(result)))
    g8, s_g = rounded(d_y * s_out.astype(np.float32), everything if whole else outputs, of_gradient)
    expected_x = np.einsum(f"{result},{right}->{left}", g8 * s_g, w8)
    s_rows = s_x.reshape(*s_x.shape[:2], *(1,) * len(outputs)).astype(np.float32)
    g8, s_g = rounded(d_y * s_rows, everything if whole else (0, 1), of_gradient)
    expected_w = np.einsum(f"{left},{result}->{right}", x8, g8 * s_g)
    # A tie may be rounded to either side.
    for found, wanted in ((d_x, expected_x), (d_w, expected_w)):
        np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())
        assert np.mean(np.abs(found - wanted) <= 1e-5 * np.abs(wanted).max()) > 0.9
    # |y - x w| <= |x| e_w + e_x |w| + e_x e_w, of rounding errors e.
    e_x, e_w = np.abs(x - x8 * s_x), np.abs(w - w8 * s_w)
    bound = sum(np.einsum(equation, a, b) for a, b in ((abs(x), e_w), (e_x, abs(w)), (e_x, e_w)))
    assert (np.abs(y - np.einsum(equation, x, w)) <= bound + 1e-5 * np.abs(expected).max()).all()


@pytest.mark.parametrize("scales", ["channel", "tensor"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_agrees_with_qwix(kind, scales):
    """Which maps the largest element to 127.5 in int8, where a step is then smaller by 0.4%."""
    qwix = pytest.importorskip("qwix._src.core.dot_general_qt", reason="needs the qlora extra")
    of_value, of_gradient = DTYPES[kind]
    operands = ("lhs", "rhs", "dlhs_grad", "drhs_grad")
    settings = qwix.DotGeneralQtConfig(
        lhs_qtype=of_value,
        rhs_qtype=of_value,
        dlhs_grad_qtype=of_gradient,
        drhs_grad_qtype=of_gradient,
        **{f"{operand}_disable_channelwise_axes": scales == "tensor" for operand in operands},
    )
    x, w = draw(1, 2, 7, 24), draw(2, 24, 10)
    theirs = lambda x, w: qwix.dot_general_qt(x, w, (((2,), (0,)), ((), ())), settings)  # noqa: E731
    ours = linear("btd,df->btf", sharding.GATE_UP_DF, sharding.ACT_BTF, kind, scales)
    (y, back), (expected, expected_back) = jax.vjp(ours, x, w), jax.vjp(theirs, x, w)
    d_y, tolerance = draw(3, *y.shape), 4e-2 if scales == "tensor" else 2e-2
    for found, wanted in zip((y, *back(d_y)), (expected, *expected_back(d_y)), strict=True):
        np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())
        assert kind == "int8" or np.mean(np.abs(found - wanted) <= 1e-4 * np.abs(wanted).max()) > 0.9


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_so(kind, bad):
    run = linear("btd,df->btf", sharding.GATE_UP_DF, sharding.ACT_BTF, kind)
    x, w = draw(1, 1, 3, 8), draw(2, 8, 4)
    x[0, 1, 2] = bad
    y, back = jax.vjp(run, x, w)
    assert np.isfinite(y[0, [0, 2]]).all() and not np.isfinite(y[0, 1]).any()
    assert not np.isfinite(back(jnp.ones_like(y))[1]).any()  # of the weight, which reads every row
    d_y = np.ones(y.shape, np.float32)
    d_y[0, 2, 1] = bad
    d_x = jax.vjp(run, draw(1, 1, 3, 8), w)[1](d_y)[0]
    assert np.isfinite(d_x[0, :2]).all() and not np.isfinite(d_x[0, 2]).any()


@pytest.mark.parametrize("dtype", list(LARGEST))
def test_stochastic_rounding_goes_to_a_neighbor_and_is_exact_in_the_mean(dtype):
    x = np.concatenate([draw(0, 61), [1e-9, 0.0, 64.0]]).astype(np.float32)[None]  # subnormal numbers too
    x[0, :20] *= 1e-6
    draws = 4000
    one = lambda key: Operand(*quantize(x, (1,), jnp.dtype(dtype), key))  # noqa: E731
    values, scale = jax.jit(jax.vmap(one))(jax.random.split(KEY, draws))
    found = np.float64(values)[:, 0] * np.float64(scale)[:, 0]
    low, high = found.min(0), found.max(0)
    exact, tiny = 1e-6 * np.abs(x[0]), 2.0**-16 * np.float64(scale).max()
    rare = 10 * np.float64(scale).max() / draws  # a neighbor that is so far away may never be drawn
    assert all(len(np.unique(column)) <= 2 for column in found.T)
    assert (low <= x[0] + exact + rare).all() and (x[0] - exact - rare <= high).all()
    nearest = np.float64(quantize(x, (1,), jnp.dtype(dtype)).values)[0] * np.float64(scale)[0, 0]
    assert ((nearest >= low - exact) & (nearest <= high + exact)).all()
    assert (np.abs(found.mean(0) - x[0]) <= 5 * (high - low) / 2 / np.sqrt(draws) + exact + tiny).all()
    assert not found[:, 62].any() and np.allclose(found[:, 63], 64)


def loss(kind, key=None, params=PARAMS, scales="channel"):
    def total(params):
        params = params if kind is None else eight_bit_products(params, kind, key, scales)
        options = lj.ForwardOptions(custom_vjp=True, remat="full")
        return lj.next_token_loss(CONFIG, params, TOKENS, options=options).mean

    return jax.device_get(jax.jit(jax.value_and_grad(total))(params))


def flat(tree):
    return np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    ("kind", "scales", "close"),
    [("int8", "channel", 0.998), ("fp8", "channel", 0.99), ("int8", "tensor", 0.98)],
)
def test_loss_and_gradient_of_a_model_are_near_those_of_f32_on_any_mesh(kind, scales, close):
    (exact, gradient), (found, rounded_gradient) = loss(None), loss(kind, KEY, scales=scales)
    assert abs(found - exact) < 0.01 * exact
    a, b = flat(gradient), flat(rounded_gradient)
    assert close < a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 1
    unrounded = ("embed", "final_norm", "lm_head")
    assert set(PARAMS) == {*unrounded, "layers"}
    mesh = meshes.make_mesh("fsdp=4,tensor=2")
    with jax.set_mesh(mesh):
        sharded, sharded_gradient = loss(kind, KEY, lj.shard_params(PARAMS, mesh, CONFIG), scales)
    assert abs(sharded - found) < 1e-5 * found
    # Sums in another order round ties to the other side.
    c = flat(sharded_gradient)
    assert np.linalg.norm(c - b) < 0.02 * np.linalg.norm(b)


def test_unstacked_layers_have_the_same_keys():
    stacked, unstacked = loss("int8", KEY), loss("int8", KEY, lj.unstack(PARAMS))
    assert stacked[0] == pytest.approx(unstacked[0], rel=1e-6)
    for name, (sublayer, _) in eight_bits.PROJECTIONS.items():
        one = [layer[sublayer][name] for layer in unstacked[1]["layers"]]
        np.testing.assert_allclose(stacked[1]["layers"][sublayer][name], one, atol=2e-3)


def test_every_product_of_a_layer_has_eight_bits_and_no_other():
    """Seven forward; two of each backward, for its input and its weight; those of attention stay in f32."""

    def total(params, kind):
        params = eight_bit_products(params, kind)
        return lj.next_token_loss(CONFIG, params, TOKENS, custom_vjp=True).mean

    for kind, (value, gradient) in {"int8": ("i8", "i8"), "fp8": ("f8E4M3FN", "f8E5M2")}.items():
        text = jax.jit(jax.grad(total), static_argnums=1).lower(PARAMS, kind).as_text()
        found = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", text)
        eight = sorted(tuple(sorted(pair)) for pair in found if pair != ("f32", "f32"))
        assert eight == [(value, value)] * 7 + [(value, gradient)] * 14


def test_the_base_of_a_lora_adapter_is_computed_in_eight_bits():
    settings = adapters.Lora(rank=2, alpha=4.0)
    adapter = adapters.init(settings, CONFIG, PARAMS, KEY)
    adapter = jax.tree.map(lambda leaf: leaf + 0.02 * draw(leaf.size, *leaf.shape), adapter)

    def total(adapter, kind):
        params = adapters.attach(settings, PARAMS, adapter)
        params = params if kind is None else eight_bit_products(params, kind)
        return lj.next_token_loss(CONFIG, params, TOKENS, custom_vjp=True).mean

    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    (exact, gradient), (found, rounded_gradient) = run(adapter, None), run(adapter, "int8")
    assert exact != found == pytest.approx(float(exact), rel=0.01)
    a, b = flat(gradient), flat(rounded_gradient)
    assert a @ b > 0.99 * np.linalg.norm(a) * np.linalg.norm(b)


def test_bad_input():
    with pytest.raises(ConfigError, match="products are 'int4'; they can be in int8 or fp8"):
        eight_bit_products(PARAMS, "int4")
    with pytest.raises(ConfigError, match="scales are 'row'; they can be per channel or per tensor"):
        eight_bit_products(PARAMS, "int8", scales="row")
    with pytest.raises(ConfigError, match="wq is quantized already: its products cannot be computed in int8"):
        eight_bit_products(lj.quantize(PARAMS), "int8")
    settings = adapters.Lora(rank=2, dora=True)
    adapted = adapters.attach(settings, PARAMS, adapters.init(settings, CONFIG, PARAMS, KEY))
    with pytest.raises(ConfigError, match="wq has an adapter of DoRA"):
        eight_bit_products(adapted, "fp8")
    mixture = {"attention": {}, "feed_forward": {"router": KEY}}
    with pytest.raises(ConfigError, match="products of experts cannot be computed in int8"):
        eight_bit_products({"layers": (mixture,)}, "int8")
    long = jax.ShapeDtypeStruct((133_145, 2), jnp.int8)
    run = functools.partial(product, "td,tf->df")
    with pytest.raises(ConfigError, match="sums 133,145 terms; int32 holds the sum of 133,144"):
        jax.eval_shape(run, long, long)
    assert dataclasses.is_dataclass(EightBitWeight)
