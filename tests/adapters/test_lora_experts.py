"""LoRA on the matrices of experts: a zero update, merged is attached, gradients, meshes, decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import sharding
from llama_jax.adapters import lora
from llama_jax.errors import ConfigError, InputError
from llama_jax.ops.adapted import Adapted
from llama_jax.ops.experts import experts, router_logits
from llama_jax.ops.swiglu import swiglu
from tests.adapters.adapted import assert_gradients_close, random_tokens
from tests.random_models import MIXTURE, normal

CONFIG = MIXTURE.replace(vocab_size=128)
DEFAULT = lj.ForwardOptions()
TRAINER = lj.ForwardOptions(custom_vjp=True, remat="full")
SETTINGS = lora.Lora(rank=4, alpha=6, rslora=True)
TOKENS = random_tokens()


def base_params(config=CONFIG):
    shapes = jax.eval_shape(lambda: lj.init(config, jax.random.key(0)))
    return normal(0, shapes, 0.1, {"scale": 1.0})


def random_adapter(settings=SETTINGS, params=None):
    params = PARAMS if params is None else params
    return normal(2, jax.eval_shape(lambda: lora.init(settings, params, jax.random.key(0))), 0.2, {})


PARAMS = base_params()
ADAPTER = random_adapter()


@functools.partial(jax.jit, static_argnames=("settings", "options", "merged"))
@functools.partial(jax.value_and_grad, argnums=0)
def value_and_grad(adapter, params, settings, options=DEFAULT, merged=False):
    attached = lora.attach(settings, params, adapter)
    weights = lora.merge(attached) if merged else attached
    return lj.next_token_loss(CONFIG, weights, TOKENS, options=options).total


forward = jax.jit(functools.partial(lj.forward, CONFIG))
merge = jax.jit(lora.merge)


@pytest.fixture(scope="module")
def expected():
    return value_and_grad(ADAPTER, PARAMS, SETTINGS, merged=True)


def test_an_initialized_adapter_has_one_for_each_expert_and_changes_nothing():
    adapter = lora.init(SETTINGS, PARAMS, jax.random.key(0))
    shapes = {name: leaves["a"].shape for name, leaves in adapter["layers"]["feed_forward"].items()}
    assert shapes == dict.fromkeys(("w_gate", "w_up", "w_down"), (2, 4, 64, 4))
    a = adapter["layers"]["feed_forward"]["w_down"]["a"]
    assert 0.11 < np.abs(a).max() <= 1 / 8 and (a[:, 0] != a[:, 1]).all()  # +-1 / sqrt(I)
    attached = forward(lora.attach(SETTINGS, PARAMS, adapter), TOKENS)
    np.testing.assert_array_equal(attached, forward(PARAMS, TOKENS))


def test_merged_equals_attached():
    attached = lora.attach(SETTINGS, PARAMS, ADAPTER)
    logits = forward(attached, TOKENS)
    assert np.abs(logits - forward(PARAMS, TOKENS)).max() > 0.1
    merged = merge(attached)
    np.testing.assert_allclose(logits, forward(merged, TOKENS), atol=1e-5 * np.abs(logits).max())
    leaves, base = (
        ADAPTER["layers"]["feed_forward"]["w_up"],
        PARAMS["layers"]["feed_forward"]["w_up"],
    )
    alone = base[1, 3] + 3.0 * leaves["a"][1, 3] @ leaves["b"][1, 3]  # alpha / sqrt(rank)
    np.testing.assert_allclose(merged["layers"]["feed_forward"]["w_up"][1, 3], alone, atol=1e-5)


def test_split_is_the_inverse_of_attach_and_unstacked_is_stacked():
    attached = lora.attach(SETTINGS, PARAMS, ADAPTER)
    jax.tree.map(np.testing.assert_array_equal, lora.split(attached), (PARAMS, ADAPTER))
    unstacked = lora.attach(SETTINGS, lj.unstack(PARAMS), ADAPTER)
    jax.tree.map(np.testing.assert_array_equal, unstacked, lj.unstack(attached))


@pytest.mark.parametrize("options", [DEFAULT, TRAINER])
def test_loss_and_gradients_equal_those_of_merged_weights(expected, options):
    value, found = value_and_grad(ADAPTER, PARAMS, SETTINGS, options)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    assert_gradients_close(found, expected[1])


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("fsdp=2,expert=4", DEFAULT),
        pytest.param("expert=2,context=2,tensor=2", TRAINER, marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=2,tensor=2", TRAINER, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_computes_the_same_loss_and_gradients(expected, spec, options):
    mesh = lj.make_mesh(spec)
    with jax.set_mesh(mesh):
        params = sharding.shard_params(PARAMS, mesh, CONFIG)
        made = lora.init(SETTINGS, params, jax.random.key(0))
        adapter = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), ADAPTER, made)
        value, found = value_and_grad(adapter, params, SETTINGS, options)
        merged = merge(lora.attach(SETTINGS, params, adapter))
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    assert_gradients_close(found, expected[1])
    assert all(jax.tree.leaves(jax.tree.map(lambda g, x: g.sharding == x.sharding, found, adapter)))
    down = made["layers"]["feed_forward"]["w_down"]
    sizes = {axis: mesh.shape.get(axis, 1) for axis in ("expert", "tensor", "fsdp", "context")}
    inside = 4 // sizes["expert"]
    assert down["a"].addressable_shards[0].data.shape == (2, inside, 64 // sizes["tensor"], 4)
    width = 64 // sizes["fsdp"] // sizes["context"]
    assert down["b"].addressable_shards[0].data.shape == (2, inside, 4, width)
    check = functools.partial(np.testing.assert_allclose, atol=1e-5)
    jax.tree.map(check, merged, merge(lora.attach(SETTINGS, PARAMS, ADAPTER)))


def test_values_and_gradients_are_those_of_a_loop_over_experts():
    """Of the layer alone: x W_e + scale (x a_e) b_e for every expert, weighted by the router."""
    keys = iter(jax.random.split(jax.random.key(3), 11))
    e, d, f, r, scale = 4, 16, 24, 2, 0.7
    make = lambda *shape: 0.3 * jax.random.normal(next(keys), shape)  # noqa: E731
    x, router = make(2, 9, d), make(d, e)
    bases = make(e, d, f), make(e, d, f), make(e, f, d)
    adapters = [(make(e, w.shape[1], r), make(e, r, w.shape[2])) for w in bases]
    logits = router_logits(x, router)

    def grouped(adapters, x, custom_vjp=False):
        weights = [Adapted(w, a, b, jnp.float32(scale)) for w, (a, b) in zip(bases, adapters, strict=True)]
        return experts(x, logits, *weights, num_experts_per_tok=2, custom_vjp=custom_vjp)

    def loop(adapters, x):
        values, ids = jax.lax.top_k(logits, 2)
        mixture = (jax.nn.one_hot(ids, e) * jax.nn.softmax(values)[..., None]).sum(-2)

        def expert(i):
            apply = [
                lambda y, w=w[i], a=a[i], b=b[i]: y @ w + scale * (y @ a) @ b
                for w, (a, b) in zip(bases, adapters, strict=True)
            ]
            return apply[2](swiglu(apply[0](x), apply[1](x)))

        return sum(mixture[..., i, None] * expert(i) for i in range(e))

    def run(function, **kwargs):
        total = lambda *args: jnp.sin(function(*args, **kwargs)).sum()  # noqa: E731
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(adapters, x)

    reference = run(loop)
    for custom_vjp in (False, True):
        found = run(grouped, custom_vjp=custom_vjp)
        assert_gradients_close(found, reference)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


def test_one_expert_is_dense_lora():
    one = CONFIG.replace(num_experts=1, num_experts_per_tok=1)
    dense = CONFIG.replace(num_experts=0, num_experts_per_tok=0)
    params = base_params(one)
    adapter = random_adapter(params=params)
    feed_forward = {
        name: leaf[:, 0] for name, leaf in params["layers"]["feed_forward"].items() if name != "router"
    }
    plain = {**params, "layers": {**params["layers"], "feed_forward": feed_forward}}
    update = {
        **adapter["layers"],
        "feed_forward": jax.tree.map(lambda x: x[:, 0], adapter["layers"]["feed_forward"]),
    }
    found = lj.forward(one, lora.attach(SETTINGS, params, adapter), TOKENS)
    expected = lj.forward(dense, lora.attach(SETTINGS, plain, {"layers": update}), TOKENS)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    made = [
        lora.init(SETTINGS, tree, jax.random.key(0))["layers"]["feed_forward"] for tree in (params, plain)
    ]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:, 0], y), *made)


@pytest.mark.parametrize("bits", [8, "nf4"])
def test_a_quantized_base_equals_its_dequantized_weights(bits):
    settings = lora.Lora(rank=4, target_modules=("w_*",))
    adapter = random_adapter(settings)

    def quantize(params):
        """The experts alone."""
        layers = params["layers"]
        part = lj.quantize({"layers": {"feed_forward": layers["feed_forward"]}}, bits)["layers"]
        return {**params, "layers": {**layers, **part}}

    base = quantize(PARAMS)
    zero = jax.tree.map(np.zeros_like, adapter)
    dense = merge(lora.attach(settings, base, zero))
    dense = {**base, "layers": {**base["layers"], "feed_forward": dense["layers"]["feed_forward"]}}
    expected = value_and_grad(adapter, dense, settings)
    mesh = lj.make_mesh("fsdp=2,expert=2,tensor=2" if bits == 8 else "data=4,expert=2")
    with jax.set_mesh(mesh):
        sharded = quantize(sharding.shard_params(PARAMS, mesh, CONFIG))
        on_mesh = value_and_grad(adapter, sharded, settings, TRAINER)
    for value, found in (value_and_grad(adapter, base, settings, TRAINER), on_mesh):
        np.testing.assert_allclose(value, expected[0], rtol=1e-3)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected[1]), strict=True):
            np.testing.assert_allclose(one, other, atol=5e-3 * np.abs(other).max())


def test_greedy_decoding_attached_is_that_of_merged_weights():
    attached, lengths = lora.attach(SETTINGS, lj.unstack(PARAMS), ADAPTER), np.array([12, 5])
    arguments = (TOKENS[:2], lengths, jax.random.key(0), lj.Sampling(temperature=0.0))
    found = lj.generate(CONFIG, attached, *arguments, max_new_tokens=8)
    expected = lj.generate(CONFIG, merge(attached), *arguments, max_new_tokens=8)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    plain = lj.generate(CONFIG, lj.unstack(PARAMS), *arguments, max_new_tokens=8)
    assert (found.tokens != plain.tokens).any()


def test_what_experts_do_not_take_is_one_line():
    dora = lora.Lora(dora=True)
    with pytest.raises(ConfigError, match=r"^adapter\.dora is not supported for w_gate, a matrix of experts"):
        lora.init(dora, PARAMS, jax.random.key(0))
    rows = jnp.zeros(1, jnp.int32)
    with pytest.raises(InputError, match=r"^an adapter of w_gate, w_up, w_down of experts .* per row; merge"):
        lora.attach_rows(PARAMS, [(SETTINGS, ADAPTER)], rows)
    options = lj.ForwardOptions(expert_capacity=2.0)
    with pytest.raises(ConfigError, match="needs plain weights, and these have LoRA adapters; leave it out"):
        lj.forward(CONFIG, lora.attach(SETTINGS, PARAMS, ADAPTER), TOKENS, options=options)
    other = base_params(CONFIG.replace(num_experts=2))
    with pytest.raises(ConfigError, match=r"feed_forward\.w_\w+ has 4 experts, the base model's 2 experts"):
        lora.attach(SETTINGS, other, ADAPTER)
