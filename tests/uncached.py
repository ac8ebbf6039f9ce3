"""What decoding is compared with: the model without a cache, over prompts and their continuations."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

import llama_jax as lj

ROWS = 4
# jitted once: all rows are padded to the model's context, so that it compiles one program per model.
_forward = jax.jit(lj.forward, static_argnums=0)


def logprobs_by_forward(
    config: lj.LlamaConfig, params: Any, tokens: np.ndarray, lengths: np.ndarray, new_tokens: Any
) -> np.ndarray:
    """`forward`'s log-probabilities f32 [B, new, V] where each new token was sampled.

    Args:
      config: the model.
      params: its parameters.
      tokens: int [B, T], right-padded prompts.
      lengths: int [B].
      new_tokens: int [B, new], each row's continuation.
    """
    new_tokens = np.asarray(new_tokens)
    batch, count = new_tokens.shape
    whole = _texts(tokens, lengths, new_tokens, -(-batch // ROWS) * ROWS, config.max_position_embeddings)
    parts = [np.asarray(_forward(config, params, part)) for part in np.split(whole, len(whole) // ROWS)]
    before = np.asarray(lengths)[:, None] - 1 + np.arange(count)
    logits = np.take_along_axis(np.concatenate(parts)[:batch], before[..., None], axis=1)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _texts(
    tokens: np.ndarray, lengths: np.ndarray, new_tokens: np.ndarray, rows: int, width: int
) -> np.ndarray:
    """Each prompt followed by its continuation, padded with zeros to int32 [rows, width]."""
    texts = np.zeros((rows, width), np.int32)
    for row, length in enumerate(lengths):
        texts[row, : length + new_tokens.shape[1]] = [*tokens[row, :length], *new_tokens[row]]
    return texts


def pick(logprobs: np.ndarray, tokens: Any) -> np.ndarray:
    """The values [B, new] of logprobs [B, new, V] at tokens int [B, new]."""
    return np.take_along_axis(logprobs, np.asarray(tokens)[..., None], -1)[..., 0]


def assert_greedy(
    config: lj.LlamaConfig,
    params: Any,
    tokens: np.ndarray,
    lengths: np.ndarray,
    out: lj.GenerateOutput,
    atol: float,
    rows: tuple[int, ...] | None = None,
) -> None:
    """Every token of `rows` (all by default) is the most likely one, and its log-probability is right.

    The batch stays whole, so that it may be sharded over a mesh; `params` may have adapters or be quantized.
    """
    batch, new = out.tokens.shape
    texts = _texts(tokens, lengths, np.asarray(out.tokens), batch, tokens.shape[1] + new)
    logits = np.asarray(lj.forward(config, params, texts), np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row in range(batch) if rows is None else rows:
        expected = logprobs[row, lengths[row] - 1 :][:new]
        np.testing.assert_array_equal(out.tokens[row], expected.argmax(-1))
        np.testing.assert_allclose(out.logprobs[row], expected.max(-1), atol=atol)
