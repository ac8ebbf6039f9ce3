"""Live comparison of training with torch and Hugging Face transformers: fifty steps, loss by loss."""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden import training

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.golden import make_training

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in make_training.reference_curve().items()}


def test_the_golden_curve_is_what_torch_and_transformers_say(reference: dict[str, np.ndarray]) -> None:
    assert training.difference(training.golden_curve(), reference) <= training.TOLERANCE / 4


@pytest.mark.parametrize(
    "changes",
    [{}, {"gradient_accumulation_steps": 2}, {"remat": "save_projections", "attention": "xla"}],
    ids=str,
)
def test_fifty_steps(reference: dict[str, np.ndarray], changes: dict[str, object]) -> None:
    assert training.difference(training.our_curve(**changes), reference) <= training.TOLERANCE
