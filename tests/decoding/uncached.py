"""Decoding's reference: one uncached forward pass over prompts and their continuations."""

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
    whole = np.zeros((-(-batch // ROWS) * ROWS, config.max_position_embeddings), np.int32)
    for row, length in enumerate(lengths):
        whole[row, : length + count] = [*tokens[row, :length], *new_tokens[row]]
    parts = [np.asarray(_forward(config, params, part)) for part in np.split(whole, len(whole) // ROWS)]
    before = np.asarray(lengths)[:, None] - 1 + np.arange(count)
    logits = np.take_along_axis(np.concatenate(parts)[:batch], before[..., None], axis=1)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def pick(logprobs: np.ndarray, tokens: Any) -> np.ndarray:
    """The values [B, new] of logprobs [B, new, V] at tokens int [B, new]."""
    return np.take_along_axis(logprobs, np.asarray(tokens)[..., None], -1)[..., 0]
