"""FLOPs per token against a manual count."""

from __future__ import annotations

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.plan import flops


def manual_count(model: lj.LlamaConfig, length: int) -> tuple[int, int]:
    """Multiplications and additions of one token's forward and backward pass: (weights', attention's)."""
    d, h = model.hidden_size, model.head_dim
    n, k = model.num_attention_heads, model.num_key_value_heads
    projections = d * n * h + 2 * d * k * h + n * h * d
    feed_forward = 3 * d * model.intermediate_size
    weights = model.num_hidden_layers * (projections + feed_forward) + d * model.vocab_size
    scores_and_reads = 2 * n * h * length * model.num_hidden_layers
    # A multiplication and an addition each; the backward pass has two products per forward product.
    return 2 * 3 * weights, 2 * 3 * scores_and_reads


@pytest.mark.parametrize("name", ["LLAMA2_7B", "LLAMA2_70B", "SMOLLM2_135M", "TINY"])
def test_equals_a_manual_count(name):
    model = getattr(lj.presets, name)
    for length in (128, 4096):
        weights, attention = manual_count(model, length)
        assert flops.flops_per_token(model, length, causal=False) == weights + attention
        assert flops.flops_per_token(model, length, causal=True) == weights + attention / 2
        # Without weight gradients; and with a reference model's forward pass.
        without = flops.flops_per_token(model, length, causal=False, frozen=True)
        assert without == weights * 2 // 3 + attention
        beside = flops.flops_per_token(model, length, causal=False, reference=True)
        assert beside == (weights + attention) * 4 // 3


def test_a_window_counts_the_keys_in_it():
    """Against a count of the keys of each token; the mean over tokens is within half a key."""
    plain = lj.presets.TINY.replace(num_hidden_layers=4)
    model, length = plain.replace(sliding_window=100, window_layers=(True, False, True, True)), 1024
    tokens = np.arange(1, length + 1)
    counted = 3 * np.minimum(tokens, 100).mean() + tokens.mean()
    assert flops.attended_keys(model, length, causal=True) == pytest.approx(counted, abs=0.5 * 4)
    assert flops.attended_keys(model, length, causal=False) == 3 * 100 + length
    assert flops.attended_keys(model, 100, causal=True) == 4 * 50
    heads = 12 * plain.num_attention_heads * plain.head_dim
    for causal, fewer in ((False, 3 * (1024 - 100)), (True, 3 * (512 - 100 * (1 - 100 / 2048)))):
        saved = flops.flops_per_token(plain, length, causal=causal) - flops.flops_per_token(
            model, length, causal=causal
        )
        assert saved == pytest.approx(heads * fewer)


def test_llama_2_7b():
    """6 x (6,738,415,616 parameters - 131,072,000 of the embedding - 266,240 of norms), and 12 L D T."""
    full = flops.flops_per_token(lj.presets.LLAMA2_7B, 4096, causal=False)
    assert full == 6 * 6_607_077_376 + 12 * 32 * 4096 * 4096
