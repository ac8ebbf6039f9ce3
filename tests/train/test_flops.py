"""FLOPs per token against a manual count, and the peak FLOP/s that MFU divides by."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

import llama_jax as lj
from llama_jax.train.metrics import flops


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


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
    ],
)
def test_known_device_has_the_peak_of_its_data_sheet(kind, peak, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)] * 8)
    assert flops.peak_flops(jnp.dtype(jnp.bfloat16)) == 8 * peak


def test_simulated_devices_share_one_measured_peak(monkeypatch):
    monkeypatch.setattr(flops, "_measured_flops", lambda dtype: 1e9)
    assert jax.device_count() == 8
    assert flops.peak_flops(jnp.dtype(jnp.float32)) == 1e9


def test_unknown_accelerators_are_measured_per_device(monkeypatch):
    monkeypatch.setattr(flops, "_measured_flops", lambda dtype: 1e9)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v99")] * 8)
    assert flops.peak_flops(jnp.dtype(jnp.float32)) == 8e9


def test_measured_flops_are_plausible():
    assert 1e8 < flops._measured_flops(jnp.dtype(jnp.float32)) < 1e14
