"""A mixture of experts in the model: meshes, scanned and unrolled layers, decoding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import sharding
from llama_jax.errors import ConfigError
from llama_jax.forward_options import ForwardOptions
from llama_jax.meshes import make_mesh
from llama_jax.model import routed_hidden_states
from tests.random_models import MIXTURE

CONFIG = MIXTURE
TOKENS = jax.random.randint(jax.random.key(1), (8, 16), 0, CONFIG.vocab_size)
SEGMENTS = jnp.broadcast_to(jnp.where(jnp.arange(16) < 13, 1, 0), TOKENS.shape)
TRAINER = ForwardOptions(custom_vjp=True, remat="full", attention_backend="blockwise")


def larger(params):
    """Parameters whose experts and routers matter: those of init change the output by little."""
    scaled = jax.tree.map(lambda leaf: 8 * leaf, params["layers"]["feed_forward"])
    return {**params, "layers": {**params["layers"], "feed_forward": scaled}}


PARAMS = larger(lj.init(CONFIG, jax.random.key(0)))


def run(params, options=ForwardOptions()):
    """Hidden states and router losses, with the gradient of a sum of all."""

    def total(params):
        x, losses = routed_hidden_states(CONFIG, params, TOKENS, segment_ids=SEGMENTS, options=options)
        weights = jnp.sin(jnp.arange(x.size).reshape(x.shape))
        return (x * weights).sum() + 100 * losses.balance + losses.z, (x, losses)

    return jax.jit(jax.value_and_grad(total, has_aux=True))(params)


@pytest.fixture(scope="module")
def expected():
    return run(PARAMS)


def check_equal(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6 * np.abs(other).max())


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("fsdp=2,expert=2,tensor=2", ForwardOptions()),
        ("fsdp=2,expert=2,context=2", TRAINER),
        pytest.param("fsdp=4,tensor=2", TRAINER, marks=pytest.mark.slow),
        pytest.param("expert=2,context=2,tensor=2", ForwardOptions(custom_vjp=True), marks=pytest.mark.slow),
        ("fsdp=2,expert=2,tensor=2", ForwardOptions(expert_capacity=2.0)),  # an all-to-all; nothing dropped
    ],
)
def test_a_mesh_computes_the_same_values_losses_and_gradients(expected, spec, options):
    mesh = make_mesh(spec)
    with jax.set_mesh(mesh):
        found = run(sharding.shard_params(PARAMS, mesh, CONFIG), options)
    check_equal(found, expected)
    gate = found[1]["layers"]["feed_forward"]["w_gate"]
    shape = (2, 4 // mesh.shape.get("expert", 1), 64 // mesh.shape["fsdp"] // mesh.shape["context"])
    assert gate.addressable_shards[0].data.shape == (*shape, 64 // mesh.shape["tensor"])


def test_the_trainers_backward_pass_has_the_same_gradients(expected):
    check_equal(run(PARAMS, TRAINER), expected)


def test_gradients_of_experts_are_summed_over_devices_in_f32():
    mesh = make_mesh("fsdp=4,expert=2")
    options = ForwardOptions(dtype="bfloat16", custom_vjp=True)

    def loss(params):
        return lj.next_token_loss(CONFIG, params, TOKENS, options=options).mean

    with jax.set_mesh(mesh):
        program = str(jax.make_jaxpr(jax.grad(loss))(sharding.shard_params(PARAMS, mesh, CONFIG)))
    scattered = re.findall(r":(\w+)\[([\d,]+)\]\S* = reduce_scatter\[", program)
    of_experts = [dtype for dtype, shape in scattered if shape.startswith("2,")]  # of a device's two experts
    assert of_experts == ["f32"] * 3


hidden_states = jax.jit(routed_hidden_states, static_argnums=0)


def test_unrolled_layers_are_the_scanned_ones(expected):
    (_, (x, losses)), _ = expected
    y, others = hidden_states(CONFIG, lj.unstack(PARAMS), TOKENS, segment_ids=SEGMENTS)
    check_equal((y, others), (x, losses))


def test_router_losses_of_layers_that_differ_are_those_of_unrolled_ones():
    config = CONFIG.replace(rope_layers=(True, False))
    scanned, unrolled = (hidden_states(config, params, TOKENS) for params in (PARAMS, lj.unstack(PARAMS)))
    check_equal(scanned, unrolled)


PROMPTS, LENGTHS, KEY = TOKENS[:4], np.array([5, 9, 16, 1]), jax.random.key(0)
GREEDY = {"max_new_tokens": 6, "sampling": lj.Sampling(temperature=0.0)}


def test_decoding_with_a_cache_continues_as_without_and_a_row_as_alone():
    params = lj.unstack(PARAMS)
    out = lj.generate(CONFIG, params, PROMPTS, LENGTHS, KEY, **GREEDY)
    alone = lj.generate(CONFIG, params, PROMPTS[1:2], LENGTHS[1:2], KEY, **GREEDY)
    np.testing.assert_array_equal(alone.tokens[0], out.tokens[1])
    whole = np.zeros((4, 22), np.int32)
    for row, length in enumerate(LENGTHS):
        whole[row, : length + 6] = [*PROMPTS[row, :length], *out.tokens[row]]
    best = np.asarray(jax.jit(lj.forward, static_argnums=0)(CONFIG, PARAMS, whole)).argmax(-1)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(best[row, length - 1 : length + 5], out.tokens[row])


def test_one_row_decodes_on_a_mesh_as_without():
    row = PROMPTS[2:3], LENGTHS[2:3]
    expected = lj.generate(CONFIG, lj.unstack(PARAMS), *row, KEY, **GREEDY)
    mesh = make_mesh("fsdp=2,expert=2,tensor=2")
    with jax.set_mesh(mesh):
        params = sharding.shard_params(lj.unstack(PARAMS), mesh, CONFIG)
        found = lj.generate(CONFIG, params, *row, KEY, **GREEDY)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_init_has_the_deviations_of_a_feed_forward_layer():
    made = lj.init(CONFIG, jax.random.key(0))["layers"]["feed_forward"]
    shapes = {name: leaf.shape for name, leaf in made.items()}
    assert shapes == {
        "router": (2, 64, 4),
        "w_gate": (2, 4, 64, 64),
        "w_up": (2, 4, 64, 64),
        "w_down": (2, 4, 64, 64),
    }
    deviations = {name: float(leaf.std()) for name, leaf in made.items()}
    assert deviations == pytest.approx(
        {"router": 0.02, "w_gate": 0.02, "w_up": 0.02, "w_down": 0.01}, rel=0.1
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(lj.init(CONFIG, jax.random.key(0)))) == CONFIG.num_params
    idle = 2 * 3 * 64 * 64 * 2  # layers, matrices, and the two experts that a token does not go through
    assert CONFIG.num_params - CONFIG.num_active_params == idle


def test_an_expert_axis_that_does_not_divide_is_one_line():
    with pytest.raises(ConfigError) as error, jax.set_mesh(make_mesh("expert=8")):
        lj.init(CONFIG, jax.random.key(0))
    text = str(error.value)
    assert "feed_forward.w_gate: num_experts 4 does not divide over axis expert of size 8" in text
    assert "(sizes that would: 1, 2, 4)" in text and "\n" not in text


@pytest.mark.parametrize(("experts", "top"), [(4, 5), (4, 0), (0, 2), (-1, 0), (True, 1)])
def test_an_invalid_number_of_experts_is_one_line(experts, top):
    with pytest.raises(ConfigError, match=r"num_experts"):
        lj.LlamaConfig(num_experts=experts, num_experts_per_tok=top)


def dequantized(weight):
    """[L, E, I, O]"""
    return jax.vmap(jax.vmap(lambda one: one.dequantize().T))(weight)


@pytest.mark.parametrize(
    ("bits", "mesh"),
    [(8, "fsdp=2,expert=2,tensor=2"), pytest.param(4, "data=4,expert=2", marks=pytest.mark.slow)],
)
def test_quantized_experts_compute_what_their_dequantized_matrices_do(bits, mesh):
    quantized = lj.quantize(PARAMS, bits)
    found = quantized["layers"]["feed_forward"]
    assert found["router"] is PARAMS["layers"]["feed_forward"]["router"]
    assert found["w_up"].values.shape[:3] == (2, 4, 64)
    plain = {name: leaf if name == "router" else dequantized(leaf) for name, leaf in found.items()}
    layers = {**quantized["layers"], "feed_forward": plain}
    expected = lj.forward(CONFIG, {**quantized, "layers": layers}, TOKENS)
    tolerance = 2e-4 * np.abs(expected).max()
    np.testing.assert_allclose(lj.forward(CONFIG, quantized, TOKENS), expected, atol=tolerance)
    with jax.set_mesh(make_mesh(mesh)):
        params = lj.quantize(sharding.shard_params(PARAMS, make_mesh(mesh), CONFIG), bits)
        logits = lj.forward(CONFIG, params, TOKENS)
    np.testing.assert_allclose(logits, expected, atol=tolerance)


@pytest.mark.slow
def test_one_beam_and_speculation_are_greedy():
    given = CONFIG, lj.unstack(PARAMS), PROMPTS, LENGTHS
    out = lj.generate(*given, KEY, **GREEDY)
    beams = lj.beam_search(*given, num_beams=1, max_new_tokens=6)
    np.testing.assert_array_equal(beams.tokens[:, 0], out.tokens)
    drafted = lj.speculative_generate(*given, KEY, **GREEDY)
    np.testing.assert_array_equal(drafted.output.tokens, out.tokens)
