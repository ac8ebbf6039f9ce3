"""LoRA: merged equals attached, initialization is a zero update, only the adapter has gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.adapters import lora
from llama_jax.errors import ConfigError, InputError
from tests.adapters.adapted import (
    CONFIG,
    base_params,
    check_gradients_on_a_mesh,
    random_adapter,
    random_tokens,
)

KINDS = {
    "lora": lora.Lora(rank=4, alpha=8),
    "rslora": lora.Lora(rank=4, alpha=3, rslora=True, target_modules=("q_proj", "attention.wo", "w_*")),
    "dora": lora.Lora(rank=4, alpha=8, dora=True),
}


@pytest.fixture(scope="module")
def params():
    return base_params()


@pytest.fixture(scope="module")
def tokens():
    return random_tokens()


@pytest.mark.parametrize("kind", KINDS)
def test_an_initialized_adapter_is_a_zero_update(kind, params, tokens):
    attached = lora.attach(KINDS[kind], params, lora.init(KINDS[kind], params, jax.random.key(0)))
    np.testing.assert_allclose(
        lj.forward(CONFIG, attached, tokens), lj.forward(CONFIG, params, tokens), atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("custom_vjp", [False, True])
def test_merged_equals_attached(kind, custom_vjp, params, tokens):
    attached = lora.attach(KINDS[kind], params, random_adapter(KINDS[kind], params))
    logits = lj.forward(CONFIG, attached, tokens, custom_vjp=custom_vjp)
    assert np.abs(logits - lj.forward(CONFIG, params, tokens)).max() > 0.01
    np.testing.assert_allclose(logits, lj.forward(CONFIG, lora.merge(attached), tokens), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_split_is_the_inverse_of_attach(kind, params):
    adapter = random_adapter(KINDS[kind], params)
    plain, found = lora.split(lora.attach(KINDS[kind], params, adapter))
    jax.tree.map(np.testing.assert_array_equal, (plain, found), (params, adapter))


def test_unstacked_equals_stacked(params, tokens):
    adapter = random_adapter(KINDS["dora"], params)
    stacked = lora.attach(KINDS["dora"], params, adapter)
    unstacked = lora.attach(KINDS["dora"], lj.unstack(params), adapter)
    expected = lj.forward(CONFIG, stacked, tokens)
    np.testing.assert_allclose(lj.forward(CONFIG, unstacked, tokens), expected, atol=1e-5)
    np.testing.assert_allclose(lj.forward(CONFIG, lj.unstack(stacked), tokens), expected, atol=1e-5)
    np.testing.assert_allclose(
        lj.forward(CONFIG, lora.merge(lj.unstack(stacked)), tokens), expected, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_merged_weights(kind, params, tokens):
    adapter = random_adapter(KINDS[kind], params)

    def loss(adapter, merged, **options):
        attached = lora.attach(KINDS[kind], params, adapter)
        weights = lora.merge(attached) if merged else attached
        return lj.next_token_loss(CONFIG, weights, tokens, **options).total

    # Merged weights differentiate through the norm, which DoRA treats as a constant.
    expected = jax.grad(lambda a: loss(a, merged=kind != "dora"))(adapter)
    found = jax.jit(jax.grad(lambda a: loss(a, merged=False, custom_vjp=True)))(adapter)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4 * np.abs(y).max() + 1e-6), found, expected
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_on_a_mesh_equal_one_device(kind, params):
    check_gradients_on_a_mesh(KINDS[kind], params, "fsdp=4,tensor=2")


@pytest.mark.parametrize("bits", [8, "nf4"])
def test_quantized_base_equals_its_dequantized_weights(bits, params, tokens):
    base = lj.quantize(params, bits)
    settings = KINDS["lora"]
    adapter = random_adapter(settings, params)
    plain = lora.merge(lora.attach(settings, base, adapter))

    def loss(adapter, base, custom_vjp):
        weights = lora.attach(settings, base, adapter)
        return lj.next_token_loss(CONFIG, weights, tokens, custom_vjp=custom_vjp).mean

    zeros = jax.tree.map(jnp.zeros_like, adapter)
    dense = lora.merge(lora.attach(settings, base, zeros))
    dense["embed"] = base["embed"]
    found = jax.value_and_grad(loss)(adapter, base, True)
    expected = jax.value_and_grad(loss)(adapter, dense, False)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), found, expected)
    logits = lj.forward(CONFIG, lora.attach(settings, base, adapter), tokens)
    np.testing.assert_allclose(logits, lj.forward(CONFIG, plain, tokens), atol=1e-4)


def test_nf4_base_takes_under_0_6_bytes_per_parameter(params):
    base = lj.quantize(params, "nf4")
    size = sum(x.nbytes for x in jax.tree.leaves(base))
    assert size < 0.6 * sum(x.size for x in jax.tree.leaves(params))


def test_nf4_matches_qwix(params):
    import qwix

    weight = params["layers"]["feed_forward"]["w_down"][0]
    reference = qwix.quantize(weight.T, "nf4", channelwise_axes=(0,), tiled_axes={1: 64})
    found = lj.quantize(params, "nf4")["layers"]["feed_forward"]["w_down"]
    layer = jax.tree.map(lambda x: x[0], found)
    np.testing.assert_array_equal(layer.dequantize(), qwix.dequantize(reference))


def test_per_row_adapters(params, tokens):
    first, second = KINDS["lora"], lora.Lora(rank=2, alpha=1, target_modules=("wq", "w_down"))
    adapters = [(first, random_adapter(first, params)), (second, random_adapter(second, params, seed=9))]
    rows = jnp.array([1, 0, -1, 1])
    prompts, lengths = tokens[:4], jnp.array([12, 9, 12, 7])
    options = {"sampling": lj.Sampling(temperature=0.0), "max_new_tokens": 8}
    both = lj.generate(
        CONFIG,
        lora.attach_rows(lj.unstack(params), adapters, rows),
        prompts,
        lengths,
        jax.random.key(0),
        **options,
    )
    for row, index in enumerate(rows.tolist()):
        single = params if index < 0 else lora.attach(adapters[index][0], params, adapters[index][1])
        alone = lj.generate(
            CONFIG, single, prompts[row : row + 1], lengths[row : row + 1], jax.random.key(0), **options
        )
        np.testing.assert_array_equal(both.tokens[row], alone.tokens[0])
        np.testing.assert_allclose(both.logprobs[row], alone.logprobs[0], atol=1e-4)


def test_beams_use_their_rows_adapter(params, tokens):
    settings = KINDS["lora"]
    adapters = [
        (settings, random_adapter(settings, params)),
        (settings, random_adapter(settings, params, seed=9)),
    ]
    lengths = jnp.full(2, 12)
    mixed = lora.attach_rows(lj.unstack(params), adapters, jnp.array([1, 0]))
    both = lj.beam_search(CONFIG, mixed, tokens[:2], lengths, 3, max_new_tokens=6)
    for row, index in enumerate((1, 0)):
        single = lora.attach(settings, lj.unstack(params), adapters[index][1])
        alone = lj.beam_search(CONFIG, single, tokens[row : row + 1], lengths[:1], 3, max_new_tokens=6)
        np.testing.assert_array_equal(both.tokens[row], alone.tokens[0])


def test_a_pattern_without_a_match_lists_the_names():
    with pytest.raises(ConfigError, match=r"'q_porj' matches no projection; did you mean q_proj\? .*w_down"):
        lora.Lora(target_modules=("wq", "q_porj"))
    with pytest.raises(ConfigError, match="empty"):
        lora.Lora(target_modules=())


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 0), ("rank", 2.5), ("alpha", 0.0), ("alpha", float("nan"))]
)
def test_invalid_settings(field, value):
    with pytest.raises(ConfigError, match=rf"adapter\.{field} is"):
        lora.Lora(**{field: value})


def test_adapter_for_another_model(params):
    other = lj.init(CONFIG.replace(num_hidden_layers=3), jax.random.key(0))
    adapter = lora.init(KINDS["lora"], other, jax.random.key(0))
    with pytest.raises(
        ConfigError, match=r"another model: attention\.wq has 3 layers of 64 x 64, the base model's 2"
    ):
        lora.attach(KINDS["lora"], params, adapter)


def test_invalid_per_row_adapters(params):
    with pytest.raises(InputError, match="no adapters"):
        lora.attach_rows(params, [], jnp.zeros(1, jnp.int32))
    adapter = lora.init(KINDS["dora"], params, jax.random.key(0))
    with pytest.raises(InputError, match="DoRA"):
        lora.attach_rows(params, [(KINDS["dora"], adapter)], jnp.zeros(1, jnp.int32))
    adapter = lora.init(KINDS["lora"], params, jax.random.key(0))
    several = lora.attach_rows(params, [(KINDS["lora"], adapter)], jnp.zeros(1, jnp.int32))
    with pytest.raises(InputError, match="cannot be merged"):
        lora.merge(several)
