"""FLOPs per token against a manual count."""

from __future__ import annotations

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


def test_llama_2_7b():
    """6 x (6,738,415,616 parameters - 131,072,000 of the embedding - 266,240 of norms), and 12 L D T."""
    full = flops.flops_per_token(lj.presets.LLAMA2_7B, 4096, causal=False)
    assert full == 6 * 6_607_077_376 + 12 * 32 * 4096 * 4096
