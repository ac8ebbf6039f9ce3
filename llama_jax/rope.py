"""Rotary position embedding (arXiv 2104.09864): frequencies, their scaling rules, the rotation.

Dimensions i and i + H/2 of a head rotate together (the split-halves layout of Hugging Face); Meta's
interleaved layout is the same model with the columns of wq and wk permuted; the loaders convert it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling
from llama_jax.ops.rotary import rotate_custom_vjp


class Rotary(NamedTuple):
    """Cosines and sines of the rotation angles at given positions, f32 [B, T, H/2] each."""

    cos: jax.Array
    sin: jax.Array


def effective_theta(theta: float, scaling: RopeScaling | None, *, head_dim: int) -> float:
    """The rotary base after `ntk` scaling, which changes nothing else; `theta` for every other kind."""
    if scaling is None or scaling.kind != "ntk":
        return theta
    return theta * scaling.factor ** (head_dim / (head_dim - 2))


def rotary_frequencies(
    *, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, float]:
    """Radians per position of each rotated pair, and the factor on cos and sin.

    Plain: `theta ** (-2i / H)` for i in [0, H/2), factor 1. See `RopeScaling` for the rest.

    Args:
      head_dim: H.
      theta: the base.
      scaling: the scaling rule for long contexts, or None.

    Returns:
      f32 [H/2], as a numpy array, so a constant under tracing; and the factor.
    """
    theta = effective_theta(theta, scaling, head_dim=head_dim)
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    factor = 1.0
    if scaling is not None and scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling is not None and scaling.kind == "yarn":
        frequencies = _yarn(frequencies, scaling, head_dim=head_dim, theta=theta)
        given = scaling.attention_factor
        factor = 0.1 * math.log(scaling.factor) + 1.0 if given is None else given
    elif scaling is not None and scaling.kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    return frequencies.astype(np.float32), factor


def _yarn(frequencies: np.ndarray, scaling: RopeScaling, *, head_dim: int, theta: float) -> np.ndarray:
    """Interpolates low frequencies and keeps high ones, with a ramp between (arXiv 2309.00071, 3.2)."""
    context = scaling.original_max_position_embeddings
    assert context is not None  # checked by RopeScaling

    def dimension(rotations: float) -> float:
        """The pair whose frequency gives this many rotations over the original context."""
        return head_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 0.001)  # as in the reference code: the ramp's width must not be zero
    ramp = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Divides low frequencies by the factor, up to a smooth transition (meta-llama/llama-models)."""
    context = scaling.original_max_position_embeddings
    assert context is not None  # checked by RopeScaling
    rotations = context * frequencies / (2 * math.pi)
    smooth = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotary(config: LlamaConfig, positions: jax.Array) -> Rotary:
    """Rotation tables for `positions`, int [B, T]; the angles are f32 whatever the compute dtype."""
    frequencies, factor = rotary_frequencies(
        head_dim=config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling
    )
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return Rotary(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rotate(x: jax.Array, table: Rotary, *, custom_vjp: bool = False) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head by the angles of its position.

    Args:
      x: [B, T, N, H] queries or keys, any float dtype.
      table: from `rotary`.
      custom_vjp: compute the same with a custom backward pass, for training.

    Returns:
      [B, T, N, H] in x's dtype; computed in f32.
    """
    if custom_vjp:
        return rotate_custom_vjp(x, table.cos, table.sin)
    cos, sin = table.cos[:, :, None], table.sin[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
