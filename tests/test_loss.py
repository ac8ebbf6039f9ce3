"""Cross-entropy: chunks, masks, segments, z-loss and memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from tests.optimized import optimized
from tests.random_models import random_model, random_prompts

CONFIG, PARAMS = random_model(0)
TOKENS, _ = random_prompts(0, CONFIG, [12, 12])


def reference_loss(params, mask):
    """-log softmax(forward) of the next token, all logits at once."""
    logprobs = jax.nn.log_softmax(lj.forward(CONFIG, params, TOKENS))[:, :-1]
    picked = jnp.take_along_axis(logprobs, TOKENS[:, 1:, None], axis=-1)[..., 0]
    return -(picked * mask[:, 1:]).sum() / mask[:, 1:].sum()


@pytest.mark.parametrize("chunks", [1, 4, 5, 100])
def test_equals_masked_cross_entropy_with_any_number_of_chunks(chunks):
    mask = np.asarray(jax.random.uniform(jax.random.key(1), TOKENS.shape) * (TOKENS % 3 > 0), np.float32)
    expected, grads = jax.value_and_grad(reference_loss)(PARAMS, mask)
    mean = lambda p: lj.next_token_loss(CONFIG, p, TOKENS, mask, num_chunks=chunks).mean  # noqa: E731
    value, got = jax.value_and_grad(mean)(PARAMS)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, grads)


@pytest.mark.parametrize("custom_vjp", [False, True])
def test_z_loss_is_the_square_of_log_z(custom_vjp):
    """PaLM, arXiv 2204.02311, section 5; value and gradient from all logits."""
    mask = TOKENS % 3 > 0

    def reference(params):
        log_z = jax.nn.logsumexp(lj.forward(CONFIG, params, TOKENS), axis=-1)[:, :-1]
        return reference_loss(params, mask) + 0.01 * (log_z**2 * mask[:, 1:]).sum() / mask[:, 1:].sum()

    def ours(params):
        return lj.next_token_loss(CONFIG, params, TOKENS, mask, custom_vjp=custom_vjp, z_loss=0.01).mean

    (expected, grads), (value, got) = (jax.jit(jax.value_and_grad(f))(PARAMS) for f in (reference, ours))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, grads)
    assert abs(value - reference_loss(PARAMS, mask)) > 0.01


def test_packed_documents_equal_separate_ones():
    apart = lj.next_token_loss(CONFIG, PARAMS, TOKENS)
    positions = np.tile(np.arange(12), 2)[None]
    packed = lj.next_token_loss(
        CONFIG, PARAMS, TOKENS.reshape(1, 24), positions=positions, segment_ids=np.repeat([0, 1], 12)[None]
    )
    np.testing.assert_allclose(packed.total, apart.total, rtol=1e-5)
    assert packed.count == apart.count == 22


def test_loss_with_an_empty_mask_is_zero():
    empty = lj.next_token_loss(CONFIG, PARAMS, TOKENS, np.zeros(TOKENS.shape, bool))
    assert empty.mean == 0 and empty.count == 0


def test_logits_of_a_sequence_are_never_in_memory():
    config = lj.presets.TINY.replace(vocab_size=20_000, num_hidden_layers=1)
    params = jax.eval_shape(lambda key: lj.init(config, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def peak(chunks):
        mean = lambda p, t: lj.next_token_loss(config, p, t, num_chunks=chunks).mean  # noqa: E731
        compiled = optimized(jax.jit(jax.grad(mean)).lower(params, tokens))
        return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()

    whole, whole_text = peak(1)
    chunked, text = peak(8)
    assert "f32[2,128,20000]" in whole_text and "f32[2,128,20000]" not in text
    assert chunked < whole - 2 * 128 * 20_000 * 4
