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
    assert_gradients_close,
    base_params,
    check_gradients_on_a_mesh,
    random_adapter,
    random_tokens,
    value_and_grad,
)
from tests.uncached import assert_greedy

CUSTOM_VJP = lj.ForwardOptions(custom_vjp=True)
merge = jax.jit(lora.merge)

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
def test_merged_equals_attached(kind, params, tokens):
    attached = lora.attach(KINDS[kind], params, random_adapter(KINDS[kind], params))
    logits = lj.forward(CONFIG, attached, tokens)
    assert np.abs(logits - lj.forward(CONFIG, params, tokens)).max() > 0.01
    np.testing.assert_allclose(logits, lj.forward(CONFIG, merge(attached), tokens), atol=1e-5)


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
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
        merge(lj.unstack(stacked)),
        lj.unstack(merge(stacked)),
    )


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loss_and_gradients_equal_those_of_merged_weights(kind, params, tokens):
    adapter = random_adapter(KINDS[kind], params)
    # Merged weights differentiate through the norm, which DoRA treats as a constant.
    value, expected = value_and_grad(adapter, params, tokens, KINDS[kind], merged=kind != "dora")
    custom_value, found = value_and_grad(adapter, params, tokens, KINDS[kind], CUSTOM_VJP)
    np.testing.assert_allclose(custom_value, value, rtol=1e-5)
    assert_gradients_close(found, expected)


def test_gradients_on_a_mesh_equal_one_device(params):
    """DoRA's: LoRA's update, then the magnitudes."""
    check_gradients_on_a_mesh(KINDS["dora"], params, "fsdp=4,tensor=2")


@pytest.mark.parametrize("bits", [8, "nf4"])
def test_quantized_base_equals_its_dequantized_weights(bits, params, tokens):
    base = lj.quantize(params, bits)
    settings = KINDS["lora"]
    adapter = random_adapter(settings, params)
    dense = merge(lora.attach(settings, base, jax.tree.map(np.zeros_like, adapter)))
    value, found = value_and_grad(adapter, base, tokens, settings, CUSTOM_VJP)
    dense_value, expected = value_and_grad(adapter, dense, tokens, settings)
    predictions = tokens[:, 1:].size
    np.testing.assert_allclose(value / predictions, dense_value / predictions, atol=2e-4)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x / predictions, y / predictions, atol=2e-4), found, expected
    )
    if bits == "nf4":
        attached = lora.attach(settings, base, adapter)
        logits = lj.forward(CONFIG, attached, tokens)
        np.testing.assert_allclose(logits, lj.forward(CONFIG, merge(attached), tokens), atol=1e-4)


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
    """Greedy tokens and their logprobs are those of the row's merged weights, without a cache."""
    first, second = KINDS["lora"], lora.Lora(rank=2, alpha=1, target_modules=("wq", "w_down"))
    adapters = [(first, random_adapter(first, params)), (second, random_adapter(second, params, seed=9))]
    rows, lengths = np.array([1, 0, -1, 1]), np.array([12, 9, 12, 7])
    mixed = lora.attach_rows(lj.unstack(params), adapters, jnp.asarray(rows))
    out = lj.generate(
        CONFIG, mixed, tokens[:4], lengths, jax.random.key(0), lj.Sampling(temperature=0.0), max_new_tokens=8
    )
    for row, index in enumerate(rows):
        merged = params if index < 0 else merge(lora.attach(adapters[index][0], params, adapters[index][1]))
        assert_greedy(CONFIG, merged, tokens, lengths, out, atol=1e-4, rows=(row,))


def test_beams_use_their_rows_adapter(params, tokens):
    settings = KINDS["lora"]
    adapters = [(settings, random_adapter(settings, params, seed=seed)) for seed in (2, 9)]
    prompts, lengths = tokens[[0, 0]], np.full(2, 12)

    def search(rows):
        mixed = lora.attach_rows(lj.unstack(params), adapters, jnp.asarray(rows))
        return np.asarray(lj.beam_search(CONFIG, mixed, prompts, lengths, 3, max_new_tokens=6).tokens)

    # All rows with one adapter: whichever row's a beam took, it would be right.
    first, second = search([0, 0]), search([1, 1])
    assert (first != second).any()
    np.testing.assert_array_equal(search([1, 0]), [second[0], first[1]])


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
    adapter = random_adapter(KINDS["lora"], base_params(CONFIG.replace(num_hidden_layers=3)))
    with pytest.raises(
        ConfigError, match=r"another model: attention\.wk has 3 layers of 64 x 32, the base model's 2"
    ):
        lora.attach(KINDS["lora"], params, adapter)


def test_invalid_per_row_adapters(params):
    with pytest.raises(InputError, match="no adapters"):
        lora.attach_rows(params, [], jnp.zeros(1, jnp.int32))
    adapter = random_adapter(KINDS["dora"], params)
    with pytest.raises(InputError, match="DoRA"):
        lora.attach_rows(params, [(KINDS["dora"], adapter)], jnp.zeros(1, jnp.int32))
    adapter = random_adapter(KINDS["lora"], params)
    several = lora.attach_rows(params, [(KINDS["lora"], adapter)], jnp.zeros(1, jnp.int32))
    with pytest.raises(InputError, match="cannot be merged"):
        lora.merge(several)
