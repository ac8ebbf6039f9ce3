"""SmolLM2-135M, with its published weights, equals Hugging Face transformers (golden file)."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.decoding.arguments import pad_right
from tests.golden import cases

pytestmark = pytest.mark.slow

PROMPTS = 5
# Ids are stored in 16 bits.
_WIDE = {np.dtype(np.uint16): np.dtype(np.int32)}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(cases.SMOLLM2) as file:
        return {name: array.astype(_WIDE.get(array.dtype, array.dtype)) for name, array in file.items()}


def test_logits_over_a_page(smollm2: lj.Model, golden: dict[str, np.ndarray]) -> None:
    forward = jax.jit(partial(lj.forward, smollm2.config))
    logits = np.asarray(forward(smollm2.params, golden["prose"][None]))[0]
    scale = golden["scale"]
    sample = logits[np.ix_(golden["positions"], golden["columns"])]
    assert np.abs(sample - golden["logits"]).max() / scale <= cases.TOLERANCE
    logsumexp = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    assert np.abs(logsumexp - golden["logsumexp"]).max() / scale <= cases.TOLERANCE
    # Positions where the two best logits are closer than the tolerance may differ.
    clear = golden["top1_margin"] > 2 * cases.TOLERANCE * scale
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(logits.argmax(-1)[clear], golden["top1"][clear])


def test_greedy_continuations(smollm2: lj.Model, golden: dict[str, np.ndarray]) -> None:
    prompts = [golden[f"prompt_{i}"].tolist() for i in range(PROMPTS)]
    greedy = np.stack([golden[f"greedy_{i}"] for i in range(PROMPTS)])[:, :32]  # parity takes all 128
    out = lj.generate(
        smollm2.config,
        smollm2.params,
        *pad_right(prompts),
        jax.random.key(0),
        lj.Sampling(temperature=0.0),
        max_new_tokens=greedy.shape[1],
    )
    np.testing.assert_array_equal(out.tokens, greedy)
