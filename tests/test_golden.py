"""The forward pass equals Hugging Face transformers on twenty small models (golden file)."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

import llama_jax as lj
from tests.golden import cases


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(cases.SMALL_MODELS) as file:
        return dict(file)


@pytest.mark.parametrize("seed", cases.SEEDS)
def test_forward_equals_hugging_face(golden: dict[str, np.ndarray], seed: int) -> None:
    case = cases.random_case(seed)
    forward = jax.jit(partial(lj.forward, case.config))
    logits = forward(case.params, case.tokens, case.positions, case.segment_ids)
    assert logits.dtype == np.float32
    assert cases.relative_error(logits, golden[f"logits_{seed}"], case.valid) <= cases.TOLERANCE


def test_golden_models_cover_every_combination() -> None:
    seen = [cases.random_case(seed) for seed in cases.SEEDS]
    configs = [case.config for case in seen]
    sharing = {1: "multi-query", 0: "grouped"}
    combinations = {
        (
            config.rope_scaling and config.rope_scaling.kind,
            "multi-head"
            if config.num_key_value_heads == config.num_attention_heads
            else sharing[config.num_key_value_heads == 1],
        )
        for config in configs
    }
    assert len(combinations) == 5 * 3
    assert {case.layout for case in seen} == {"padded", "strided", "packed"}
    assert {config.tie_word_embeddings for config in configs} == {True, False}
    assert len({config.rms_norm_eps for config in configs}) == 3
    assert len({config.rope_theta for config in configs}) == 4
    natural = {config.head_dim * config.num_attention_heads == config.hidden_size for config in configs}
    assert natural == {True, False}


@pytest.mark.parametrize("change", ["rope_theta", "rms_norm_eps", "rope_scaling"])
def test_golden_file_depends_on_every_setting(golden: dict[str, np.ndarray], change: str) -> None:
    """A setting that did not change the logits would not be tested by the golden file."""
    case = cases.random_case(4)
    config = case.config
    wrong = {"rope_theta": config.rope_theta * 1.01, "rms_norm_eps": 1.2e-5, "rope_scaling": None}
    forward = jax.jit(partial(lj.forward, config.replace(**{change: wrong[change]})))
    logits = forward(case.params, case.tokens, case.positions)
    assert cases.relative_error(logits, golden["logits_4"], case.valid) > 10 * cases.TOLERANCE
