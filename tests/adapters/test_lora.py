"""Adapters: merged is unmerged, nothing is changed at the start, and the adapter alone has a gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.adapters import lora
from llama_jax.errors import ConfigError, InputError
from tests.adapters.adapted import CONFIG, base, check_gradients_on_a_mesh, some_tokens, trained

KINDS = {
    "lora": lora.Lora(rank=4, alpha=8),
    "rslora": lora.Lora(rank=4, alpha=3, rslora=True, target_modules=("q_proj", "attention.wo", "w_*")),
    "dora": lora.Lora(rank=4, alpha=8, dora=True),
}


@pytest.fixture(scope="module")
def params():
    return base()


@pytest.fixture(scope="module")
def tokens():
    return some_tokens()


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(kind, params, tokens):
    attached = lora.attach(KINDS[kind], params, lora.init(KINDS[kind], params, jax.random.key(0)))
    np.testing.assert_allclose(
        lj.forward(CONFIG, attached, tokens), lj.forward(CONFIG, params, tokens), atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("custom_vjp", [False, True])
def test_merged_is_attached(kind, custom_vjp, params, tokens):
    attached = lora.attach(KINDS[kind], params, trained(KINDS[kind], params))
    logits = lj.forward(CONFIG, attached, tokens, custom_vjp=custom_vjp)
    assert np.abs(logits - lj.forward(CONFIG, params, tokens)).max() > 0.01
    np.testing.assert_allclose(logits, lj.forward(CONFIG, lora.merge(attached), tokens), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_split_takes_apart_what_attach_put_together(kind, params):
    adapter = trained(KINDS[kind], params)
    plain, found = lora.split(lora.attach(KINDS[kind], params, adapter))
    jax.tree.map(np.testing.assert_array_equal, (plain, found), (params, adapter))


def test_unstacked_is_stacked(params, tokens):
    adapter = trained(KINDS["dora"], params)
    stacked = lora.attach(KINDS["dora"], params, adapter)
    unstacked = lora.attach(KINDS["dora"], lj.unstack(params), adapter)
    expected = lj.forward(CONFIG, stacked, tokens)
    np.testing.assert_allclose(lj.forward(CONFIG, unstacked, tokens), expected, atol=1e-5)
    np.testing.assert_allclose(lj.forward(CONFIG, lj.unstack(stacked), tokens), expected, atol=1e-5)
    np.testing.assert_allclose(
        lj.forward(CONFIG, lora.merge(lj.unstack(stacked)), tokens), expected, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_merged_weights(kind, params, tokens):
    adapter = trained(KINDS[kind], params)

    def loss(adapter, merged, **how):
        attached = lora.attach(KINDS[kind], params, adapter)
        weights = lora.merge(attached) if merged else attached
        return lj.next_token_loss(CONFIG, weights, tokens, **how).total

    # Merging lets the gradient through the norm, which DoRA holds constant.
    expected = jax.grad(lambda a: loss(a, merged=kind != "dora"))(adapter)
    found = jax.jit(jax.grad(lambda a: loss(a, merged=False, custom_vjp=True)))(adapter)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4 * np.abs(y).max() + 1e-6), found, expected
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_on_a_mesh_are_those_of_one_device(kind, params):
    check_gradients_on_a_mesh(KINDS[kind], params, "fsdp=4,tensor=2")


@pytest.mark.parametrize("bits", [8, "nf4"])
def test_a_quantised_base_is_the_weights_it_stands_for(bits, params, tokens):
    base = lj.quantize(params, bits)
    settings = KINDS["lora"]
    adapter = trained(settings, params)
    plain = lora.merge(lora.attach(settings, base, adapter))

    def loss(adapter, base, custom_vjp):
        weights = lora.attach(settings, base, adapter)
        return lj.next_token_loss(CONFIG, weights, tokens, custom_vjp=custom_vjp).mean

    zeros = jax.tree.map(jnp.zeros_like, adapter)
    dense = lora.merge(lora.attach(settings, base, zeros))
    dense["embed"] = base["embed"]
    found = jax.value_and_grad(loss)(adapter, base, "fast")
    expected = jax.value_and_grad(loss)(adapter, dense, "autodiff")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), found, expected)
    logits = lj.forward(CONFIG, lora.attach(settings, base, adapter), tokens)
    np.testing.assert_allclose(logits, lj.forward(CONFIG, plain, tokens), atol=1e-4)


def test_a_base_in_nf4_has_under_six_tenths_of_a_byte_a_parameter(params):
    base = lj.quantize(params, "nf4")
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    assert size < 0.6 * sum(x.size for x in jax.tree.leaves(params))


def test_nf4_is_qwixs(params):
    import qwix

    weight = params["layers"]["feed_forward"]["w_down"][0]
    made = qwix.quantize(weight.T, "nf4", channelwise_axes=(0,), tiled_axes={1: 64})
    found = lj.quantize(params, "nf4")["layers"]["feed_forward"]["w_down"]
    np.testing.assert_array_equal(jax.tree.map(lambda x: x[0], found).dense(), qwix.dequantize(made))


def test_rows_of_a_batch_have_their_own_adapters(params, tokens):
    first, second = KINDS["lora"], lora.Lora(rank=2, alpha=1, target_modules=("wq", "w_down"))
    adapters = [(first, trained(first, params)), (second, trained(second, params, seed=9))]
    rows = jnp.array([1, 0, -1, 1])
    prompts, lengths = tokens[:4], jnp.array([12, 9, 12, 7])
    ask = {"sampling": lj.Sampling(temperature=0.0), "max_new_tokens": 8}
    both = lj.generate(
        CONFIG,
        lora.attach_rows(lj.unstack(params), adapters, rows),
        prompts,
        lengths,
        jax.random.key(0),
        **ask,
    )
    for row, which in enumerate(rows.tolist()):
        own = params if which < 0 else lora.attach(*adapters[which][:1], params, adapters[which][1])
        alone = lj.generate(
            CONFIG, own, prompts[row : row + 1], lengths[row : row + 1], jax.random.key(0), **ask
        )
        np.testing.assert_array_equal(both.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(both.logprobs[row], alone.logprobs[0], atol=1e-4)


def test_beams_of_a_row_have_the_rows_adapter(params, tokens):
    settings = KINDS["lora"]
    adapters = [(settings, trained(settings, params)), (settings, trained(settings, params, seed=9))]
    lengths = jnp.full(2, 12)
    mixed = lora.attach_rows(lj.unstack(params), adapters, jnp.array([1, 0]))
    both = lj.beam_search(CONFIG, mixed, tokens[:2], lengths, 3, max_new_tokens=6)
    for row, which in enumerate((1, 0)):
        own = lora.attach(settings, lj.unstack(params), adapters[which][1])
        alone = lj.beam_search(CONFIG, own, tokens[row : row + 1], lengths[:1], 3, max_new_tokens=6)
        np.testing.assert_array_equal(both.tokens[row], alone.tokens[0])


def test_a_pattern_that_matches_nothing_lists_the_names():
    with pytest.raises(ConfigError, match=r"'q_porj' matches no projection; did you mean q_proj\? .*w_down"):
        lora.Lora(target_modules=("wq", "q_porj"))
    with pytest.raises(ConfigError, match="empty"):
        lora.Lora(target_modules=())


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 0), ("rank", 2.5), ("alpha", 0.0), ("alpha", float("nan"))]
)
def test_settings_that_cannot_work(field, value):
    with pytest.raises(ConfigError, match=rf"adapter\.{field} is"):
        lora.Lora(**{field: value})


def test_an_adapter_for_another_model(params):
    other = lj.init(CONFIG.replace(num_hidden_layers=3), jax.random.key(0))
    adapter = lora.init(KINDS["lora"], other, jax.random.key(0))
    with pytest.raises(
        ConfigError, match=r"another model: attention\.wq has 3 layers of 64 x 64, the base's 2"
    ):
        lora.attach(KINDS["lora"], params, adapter)


def test_what_cannot_be_chosen_by_row(params):
    with pytest.raises(InputError, match="no adapters"):
        lora.attach_rows(params, [], jnp.zeros(1, jnp.int32))
    adapter = lora.init(KINDS["dora"], params, jax.random.key(0))
    with pytest.raises(InputError, match="DoRA"):
        lora.attach_rows(params, [(KINDS["dora"], adapter)], jnp.zeros(1, jnp.int32))
    adapter = lora.init(KINDS["lora"], params, jax.random.key(0))
    several = lora.attach_rows(params, [(KINDS["lora"], adapter)], jnp.zeros(1, jnp.int32))
    with pytest.raises(InputError, match="cannot be merged"):
        lora.merge(several)
