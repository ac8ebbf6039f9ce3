"""The peak FLOP/s that MFU divides by."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import pytest

from llama_jax.train.metrics import peak_flops as flops


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
        ("TPU7x", 2307e12 / 2),
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


def test_simulated_devices_have_no_peak(monkeypatch):
    monkeypatch.setattr(flops, "_measured_flops", lambda dtype: 1e9)
    assert jax.device_count() == 8
    assert flops.peak_flops(jnp.dtype(jnp.float32)) is None
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    assert flops.peak_flops(jnp.dtype(jnp.float32)) == 8e9  # eight processes


def test_unknown_accelerators_have_no_peak(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v99")] * 8)
    with pytest.warns(UserWarning, match="the peak FLOP/s of 'TPU v99' is not known: MFU is not reported"):
        assert flops.peak_flops(jnp.dtype(jnp.float32)) is None


def test_measured_flops_are_plausible():
    assert 1e8 < flops._measured_flops(jnp.dtype(jnp.float32)) < 1e14
