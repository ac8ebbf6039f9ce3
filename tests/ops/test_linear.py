"""Products, and `custom_vjp=True` of every operation: equal to autodiff, under every transformation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import llama_jax as lj
from llama_jax import rope, sharding
from llama_jax.layers import embed
from llama_jax.meshes import make_mesh
from llama_jax.ops.embedding import embed_custom_vjp
from llama_jax.ops.linear import contract, project
from llama_jax.ops.products import weight_gradient
from llama_jax.ops.swiglu import swiglu_down
from tests.optimized import optimized
from tests.random_models import random_model

F32, BF16 = jnp.float32, jnp.bfloat16


def draw(seed, *shape, dtype=F32):
    """With numpy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# Dimensions of (x, y, out): those of the model, and other orders.
PRODUCTS = [
    ("btd", "btf", "df"),
    ("btd", "btnh", "dnh"),
    ("btf", "btd", "fd"),
    ("btd", "btv", "dv"),
    ("btd", "btv", "vd"),
    ("mgts", "mgth", "msh"),
    ("td", "tf", "df"),
    ("tbd", "btf", "fd"),
    ("dbt", "btf", "df"),
    ("btd", "ftb", "df"),
    ("gbtd", "bgtf", "gfd"),
    ("bt", "btf", "f"),
    ("btd", "bt", "d"),
]
SIZES = {"b": 2, "t": 7, "d": 4, "f": 5, "n": 3, "h": 6, "v": 9, "m": 2, "g": 3, "s": 8}


@pytest.mark.parametrize("dims", PRODUCTS, ids="-".join)
def test_weight_gradient_is_einsum(dims):
    x_dims, y_dims, out_dims = dims

    @jax.jit
    def both(x, y):
        expected = jnp.einsum(f"{x_dims},{y_dims}->{out_dims}", x.astype(F32), y.astype(F32))
        return weight_gradient(x_dims, x, y_dims, y, out_dims), expected

    for dtype in (F32, BF16):
        x, y = (draw(i, *(SIZES[d] for d in letters), dtype=dtype) for i, letters in enumerate(dims[:2]))
        got, expected = both(x, y)
        assert got.dtype == F32
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("equation", "shape"),
    [("btd,df->btf", "df"), ("btd,dnh->btnh", "dnh"), ("btd,vd->btv", "vd"), ("btnh,nhd->btd", "nhd")],
)
def test_single_row_equals_the_row_in_a_batch(equation, shape, dtype):
    """`matvec` splits the contracted dimension where it is a multiple of 4."""
    specs = {
        "weight_spec": P(*(None,) * len(shape)),
        "out_spec": P(*(None,) * len(equation.split("->")[1])),
    }

    @jax.jit
    def results(inputs):
        return [compare(*pair) for pair in inputs]

    def compare(x, weight):
        run = lambda x: contract(equation, x, weight, **specs)  # noqa: E731
        slope = jax.grad(lambda x: (run(x) ** 2).sum())
        return {
            "all": run(x),
            "row": run(x[:1, :1]),
            "rows": jax.vmap(run)(x[:, :1][:, None]),  # under vmap the rows are a batch dimension
            "slopes": slope(x.astype(F32)),
            "slope": slope(x[:1, :1].astype(F32)),
        }

    inputs = []
    for width in (64, 36, 18, 3):
        sizes = SIZES | {"d": width}
        x = draw(0, *(sizes[d] for d in equation.split(",")[0]), dtype=dtype)
        inputs.append((x, draw(1, *(sizes[d] for d in shape), dtype=dtype)))
    for out in results(inputs):
        out = jax.tree.map(np.asarray, out)
        assert out["row"].dtype == F32 and out["row"].shape == out["all"][:1, :1].shape
        np.testing.assert_allclose(out["row"], out["all"][:1, :1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(out["rows"][:, 0], out["all"][:, :1], rtol=1e-5, atol=1e-5)
        rtol = 2e-2 if dtype == BF16 else 1e-4
        np.testing.assert_allclose(out["slope"], out["slopes"][:1, :1], rtol=rtol, atol=1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("at", [(0, 0, 0), (1, 3, 2)])
def test_nan_spreads_as_in_einsum(dtype, at):
    """`weight_gradient` has a conditional on a value that may be NaN."""
    x, y = draw(0, 2, 7, 4, dtype=dtype), np.array(draw(1, 2, 7, 5, dtype=dtype))
    y[at] = np.nan
    got = weight_gradient("btd", x, "btf", jnp.asarray(y), "df")
    expected = np.einsum("btd,btf->df", np.float32(x), np.float32(y))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(got).sum() == 4


def test_weight_gradient_transposes_its_left_operand_on_cpu():
    """Without the conditional, XLA contracts the leading dimension, in f32 code."""
    x, y = draw(0, 64, 32, dtype=BF16), draw(1, 64, 48, dtype=BF16)
    text = optimized(jax.jit(lambda x, y: weight_gradient("td", x, "tf", y, "df")).lower(x, y)).as_text()
    products = [line for line in text.splitlines() if " dot(" in line]
    assert products and all("lhs_contracting_dims={1}" in line for line in products)
    assert "bf16[32,64]" in text


def autodiff_and_custom(run, *inputs):
    """(value, gradients) of a randomly weighted sum of `run`, for each of `inputs`, tuples of arguments.

    Of each: with autodiff, then with the custom backward pass.
    """

    def total(args, custom_vjp):
        result = run(*args, custom_vjp=custom_vjp)
        return (result.astype(F32) * draw(9, *result.shape)).sum()

    @jax.jit
    def differentiate(inputs):
        return [[jax.value_and_grad(total)(args, custom) for custom in (False, True)] for args in inputs]

    return differentiate(inputs)


def distance(a, b):
    """|a - b| / |b| over a whole tree."""
    a, b = (np.concatenate([np.float64(leaf).ravel() for leaf in jax.tree.leaves(x)]) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


EQUATIONS = [
    ("btd,df->btf", (2, 7, 4), (4, 5), sharding.GATE_UP_DF, sharding.ACT_BTF),
    ("btf,fd->btd", (2, 7, 5), (5, 4), sharding.DOWN_FD, sharding.ACT_BTD),
    ("btd,dnh->btnh", (2, 7, 4), (4, 3, 6), sharding.WQ_DNH, sharding.ACT_BTNH),
    ("btd,df->btf", (1, 1, 4), (4, 5), sharding.GATE_UP_DF, sharding.ACT_BTF),
]


@pytest.mark.parametrize("case", EQUATIONS, ids=lambda case: f"{case[0]} {case[1]}")
def test_project_has_the_gradient_of_autodiff(case):
    equation, x_shape, w_shape, weight_spec, out_spec = case

    def run(x, w, custom_vjp):
        return project(equation, x, w, weight_spec=weight_spec, out_spec=out_spec, custom_vjp=custom_vjp)

    x, w = draw(0, *x_shape), draw(1, *w_shape)
    f32, bf16 = autodiff_and_custom(run, (x, w), (draw(0, *x_shape, dtype=BF16), w))
    (value, grads), (custom_value, custom) = f32
    np.testing.assert_allclose(custom_value, value, rtol=1e-5)
    assert distance(custom, grads) < 1e-6
    # bf16 with f32 parameters: as accurate as autodiff.
    (_, plain), (_, custom) = bf16
    assert [leaf.dtype for leaf in custom] == [BF16, F32]
    assert distance(custom, grads) < max(1.2 * distance(plain, grads), 1e-3)


def test_swiglu_down_has_the_gradient_of_autodiff():
    def run(gate, up, w_down, custom_vjp):
        return swiglu_down(gate, up, w_down, custom_vjp=custom_vjp)

    gate, up, w_down = 3 * draw(0, 2, 7, 5), draw(1, 2, 7, 5), draw(2, 5, 4)
    half = tuple(jnp.asarray(np.asarray(x).astype(BF16)) for x in (gate, up))
    f32, bf16 = autodiff_and_custom(run, (gate, up, w_down), (*half, w_down))
    (value, grads), (custom_value, custom) = f32
    np.testing.assert_allclose(custom_value, value, rtol=1e-6)
    assert distance(custom, grads) < 1e-6
    (_, plain), (_, custom) = bf16
    assert [leaf.dtype for leaf in custom] == [BF16, BF16, F32]
    assert distance(custom, grads) < max(1.2 * distance(plain, grads), 1e-3)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_rotate_custom_vjp_equals_autodiff(dtype):
    x, weight = draw(0, 2, 7, 3, 8, dtype=dtype), draw(1, 2, 7, 3, 8, dtype=dtype)

    @jax.jit
    def both(x):
        table = rope.rotary(lj.presets.TINY, jnp.arange(14).reshape(2, 7))

        def run(custom_vjp):
            out, back = jax.vjp(lambda x: rope.rotate(x, table, custom_vjp=custom_vjp), x)
            return out, *back(weight)

        return run(True), run(False)

    for ours, theirs in zip(*both(x), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.float32(ours), np.float32(theirs), atol=1e-6 if dtype == F32 else 0.02)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_embed_custom_vjp_sums_its_gradient_in_f32_and_drops_invalid_ids(dtype):
    table, tokens, weight = draw(0, 9, 4), np.array([[0, 3, 3, 8], [3, 1, 3, 3]]), draw(1, 2, 4, 4)

    @jax.jit
    def rows_and_gradients(table, tokens, weight):
        out = []
        for embed_rows in (embed_custom_vjp, embed):
            rows, back = jax.vjp(lambda table, run=embed_rows: run(table, tokens, dtype=dtype), table)
            out.append((rows, back(weight.astype(rows.dtype))[0]))
        return out

    (rows, grads), (expected_rows, expected) = rows_and_gradients(table, tokens, weight)
    np.testing.assert_array_equal(rows, expected_rows)
    assert grads.dtype == F32
    np.testing.assert_allclose(grads, expected, atol=1e-6 if dtype == F32 else 0.05)
    # Of the cotangents only that of a row with a valid id counts.
    tokens = np.array([[2, -1, 9, -9], [-1, 9, -9, 2]])
    (rows, grads), _ = rows_and_gradients(table, tokens, np.ones((2, 4, 4), np.float32))
    np.testing.assert_array_equal(np.isnan(rows), np.broadcast_to((tokens != 2)[..., None], rows.shape))
    np.testing.assert_array_equal(grads, np.where(np.arange(9) == 2, 2.0, 0.0)[:, None].repeat(4, 1))


CONFIG, PARAMS = random_model(5)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 10)).astype(np.int32)


def loss(params, tokens, custom_vjp=True):
    return lj.next_token_loss(
        CONFIG, params, tokens, attention_backend="blockwise", custom_vjp=custom_vjp
    ).total


@pytest.fixture(scope="module")
def alone():
    """Loss and autodiff gradients of each row of TOKENS."""
    run = jax.jit(jax.value_and_grad(lambda params, row: loss(params, row[None], False)))
    return [jax.device_get(run(PARAMS, row)) for row in TOKENS]


def test_per_example_gradients_by_vmap(alone):
    each = jax.jit(jax.vmap(jax.grad(lambda params, row: loss(params, row[None])), (None, 0)))(PARAMS, TOKENS)
    for i, (_, expected) in enumerate(alone):
        assert distance(jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], each), expected) < 1e-5


def test_data_parallelism_in_a_callers_shard_map(alone):
    """The loss inside a `shard_map` with another mesh and explicit collectives."""
    mesh = jax.make_mesh((4,), ("mine",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P("mine")), out_specs=(P(), P()))
    def step(params, tokens):
        value, grads = jax.value_and_grad(loss)(jax.lax.pcast(params, "mine", to="varying"), tokens)
        return jax.lax.psum((value, grads), "mine")

    value, grads = step(PARAMS, TOKENS)
    expected, expected_grads = jax.tree.map(lambda *rows: np.sum(rows, axis=0), *alone)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert distance(grads, expected_grads) < 1e-5
    # With the collective that `shard_map` inserts for replicated parameters.
    inside = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(P(), P("mine")), out_specs=P())
    assert distance(jax.jit(inside)(PARAMS, TOKENS), expected_grads) < 1e-5


def test_custom_vjp_has_no_forward_mode(alone):
    def slope(params, custom_vjp):
        run = lambda params: lj.next_token_loss(CONFIG, params, TOKENS[:1], custom_vjp=custom_vjp).total  # noqa: E731
        return jax.jvp(run, (params,), (jax.tree.map(jnp.ones_like, params),))[1]

    expected = sum(leaf.sum() for leaf in jax.tree.leaves(alone[0][1]))
    np.testing.assert_allclose(jax.jit(slope, static_argnums=1)(PARAMS, False), expected, rtol=1e-3)
    with pytest.raises(TypeError, match=r"forward-mode autodiff .* custom_vjp"):
        slope(PARAMS, True)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [("fsdp=4,tensor=2", BF16), ("data=2,context=2,tensor=2", F32), ("data=2,context=2,tensor=2", BF16)],
)
def test_mesh_gradients_equal_one_device(spec, dtype):
    """With the partition specs of the model's layers."""
    x, w, v = draw(0, 8, 4, 8, dtype=dtype), draw(1, 8, 16), draw(2, 16, 8)
    table, tokens = draw(3, 16, 8), np.arange(32, dtype=np.int32).reshape(8, 4) % 16

    def total(x, w, v, table, tokens):
        x = x + embed_custom_vjp(table, tokens, dtype=dtype)
        specs = {"weight_spec": sharding.GATE_UP_DF, "out_spec": sharding.ACT_BTF}
        up = project("btd,df->btf", x, w, **specs, custom_vjp=True)
        out = swiglu_down(up, up, v, custom_vjp=True)
        return (out.astype(F32) ** 2).mean()

    run = jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))
    value, grads = run(x, w, v, table, tokens)
    mesh = make_mesh(spec)
    specs = (
        sharding.ACT_BTD,
        sharding.GATE_UP_DF,
        sharding.DOWN_FD,
        sharding.EMBEDDING_VD,
        sharding.TOKENS_BT,
    )
    with jax.set_mesh(mesh):
        sharded = [
            jax.device_put(a, sharding.named(mesh, s))
            for a, s in zip((x, w, v, table, tokens), specs, strict=True)
        ]
        got_value, got = run(*sharded)
    np.testing.assert_allclose(got_value, value, rtol=1e-5 if dtype == F32 else 1e-2)
    for ours, theirs, spec_of in zip(got, grads, specs, strict=False):
        assert ours.sharding.spec == sharding.restrict(spec_of, mesh.axis_names)
        assert distance(jax.device_get(ours), theirs) < (1e-5 if dtype == F32 else 1e-2)
