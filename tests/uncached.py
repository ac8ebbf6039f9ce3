"""Generated text checked against the model without a cache: one program, where `generate` compiles two."""

from __future__ import annotations

from typing import Any

import numpy as np

import llama_jax as lj


def assert_greedy(
    config: lj.LlamaConfig,
    params: Any,
    tokens: np.ndarray,
    lengths: np.ndarray,
    out: lj.GenerateOutput,
    atol: float,
    rows: tuple[int, ...] | None = None,
) -> None:
    """Every token of `rows` (all by default) is the most likely one, and its logprob is right."""
    batch, new = out.tokens.shape
    texts = np.zeros((batch, tokens.shape[1] + new), np.int32)
    for row, length in enumerate(lengths):
        texts[row, : length + new] = [*tokens[row, :length], *np.asarray(out.tokens)[row]]
    logits = np.asarray(lj.forward(config, params, texts), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row in range(batch) if rows is None else rows:
        expected = logprobs[row, lengths[row] - 1 :][:new]
        np.testing.assert_array_equal(out.tokens[row], expected.argmax(-1))
        np.testing.assert_allclose(out.logprobs[row], expected.max(-1), atol=atol)
