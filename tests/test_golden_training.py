"""Fifty training steps equal torch with transformers (golden file)."""

from __future__ import annotations

import dataclasses

import pytest

from llama_jax.train import optimizer
from tests.golden import training


def test_fifty_steps_have_the_losses_of_torch_and_transformers() -> None:
    """In two microbatches, with full remat, blockwise attention, a loss in chunks: as a real run, in f32."""
    curve = training.our_curve(gradient_accumulation_steps=2)
    assert training.difference(curve, training.golden_curve()) <= training.TOLERANCE
    assert curve["loss"][-5:].mean() < curve["loss"][:5].mean() - 2  # it learns


def test_remat_backend_and_microbatches_do_not_change_the_losses() -> None:
    curve = training.our_curve(remat="none", attention="xla", loss_chunks=1)
    assert training.difference(curve, training.golden_curve()) <= training.TOLERANCE


@pytest.mark.parametrize("change", ["eps", "decayed norms"])
def test_golden_file_depends_on_every_setting(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that did not change the losses would not be tested by the golden file."""
    config = training.OPTIMIZER
    if change == "eps":
        config = dataclasses.replace(config, eps=1e-8)
    else:
        monkeypatch.setattr(optimizer, "weight_decay_mask", None)  # optax then decays every leaf
    curve = training.our_curve(config, remat="none", attention="xla", loss_chunks=1)
    assert training.difference(curve, training.golden_curve()) > 10 * training.TOLERANCE
