"""The small models, batches and texts behind the golden files, made from seeds by numpy alone.

Everything is drawn from the raw 64-bit stream of PCG64, which numpy promises never to change, so the
goldens' maker and the tests see the same numbers on every machine and with every numpy.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from llama_jax.config import LlamaConfig, RopeScaling

GOLDEN = Path(__file__).parent
SMALL_MODELS = GOLDEN / "small_models.npz"
SMOLLM2 = GOLDEN / "smollm2.npz"

SEEDS = tuple(range(20))
LENGTH = 24
# The largest difference from the reference, relative to the largest reference logit.
TOLERANCE = 2e-5

Layout = Literal["padded", "strided", "packed"]
_T = TypeVar("_T")


class Draw:
    """A stream of numbers that depends on its seed and on nothing else."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def pick(self, *options: _T) -> _T:
        return options[int(self._bits.random_raw()) % len(options)]

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        """int32 [size] in [low, high)."""
        return (low + self._bits.random_raw(size) % np.uint64(high - low)).astype(np.int32)

    def uniform(self, shape: tuple[int, ...], *, std: float, mean: float = 0.0) -> np.ndarray:
        """f32 of `shape`, uniform around `mean` with standard deviation `std`."""
        unit = (self._bits.random_raw(int(np.prod(shape))) >> np.uint64(40)).astype(np.float64) / 2**24
        return (mean + std * 12**0.5 * (unit - 0.5)).astype(np.float32).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Case:
    """One small model and one batch for it.

    Attributes:
      config: the model.
      params: its parameters as nested numpy f32 arrays, layers stacked.
      layout: what the batch exercises: `padded` rows of different lengths, `strided` positions with
        gaps, or `packed` documents told apart by segment ids, positions starting over in each.
      tokens: int32 [B, T].
      positions: int32 [B, T].
      segment_ids: int32 [B, T], from 1, for `packed`; None otherwise.
      valid: bool [B, T], False on padding, where no logits are compared.
    """

    config: LlamaConfig
    params: dict[str, Any]
    layout: Layout
    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray | None
    valid: np.ndarray


def random_case(seed: int) -> Case:
    """The case of a seed; any 60 consecutive seeds meet every combination of scaling, K and layout."""
    draw = Draw(seed)
    config = _random_config(draw, seed)
    layout: Layout = ("padded", "strided", "packed")[seed % 3]
    shape = (2, LENGTH)
    tokens = draw.integers(0, config.vocab_size, 2 * LENGTH).reshape(shape)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    valid, segment_ids = np.ones(shape, bool), None
    if layout == "padded":
        valid = positions < np.array([[LENGTH], [draw.pick(7, 13, 18)]])
    elif layout == "strided":
        # Far positions turn the slow frequencies far enough for their scaling to show.
        positions = np.cumsum(draw.integers(1, 12, 2 * LENGTH).reshape(shape), axis=1, dtype=np.int32)
    else:
        start = np.array([[draw.pick(5, 9)], [draw.pick(14, 20)]])
        segment_ids = 1 + (positions >= start).astype(np.int32)
        positions = np.where(positions >= start, positions - start, positions).astype(np.int32)
    return Case(config, random_params(config, draw), layout, tokens, positions, segment_ids, valid)


def _random_config(draw: Draw, seed: int) -> LlamaConfig:
    heads = draw.pick(4, 6, 8, 9)
    grouped = {4: 2, 6: 3, 8: 4, 9: 3}[heads]
    kv_heads = (1, heads, grouped, heads // grouped)[seed % 4]
    width = draw.pick(6, 8, 10)
    return LlamaConfig(
        vocab_size=draw.pick(48, 61, 80),
        hidden_size=heads * width,
        intermediate_size=draw.pick(40, 72, 100),
        num_hidden_layers=draw.pick(1, 2, 3),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=draw.pick(width, 8, 12, 16),
        max_position_embeddings=512,
        rms_norm_eps=draw.pick(1e-6, 1e-5, 1e-3),
        rope_theta=draw.pick(1e3, 1e4, 1e5, 5e5),
        rope_scaling=_random_scaling(draw, seed),
        tie_word_embeddings=draw.pick(False, True),
    )


def _random_scaling(draw: Draw, seed: int) -> RopeScaling | None:
    factor = draw.pick(2.0, 2.5, 4.0, 8.0)
    match seed % 5:
        case 1:
            return RopeScaling("linear", factor)
        case 2:
            return RopeScaling("ntk", factor)
        case 3:
            return RopeScaling(
                "yarn",
                factor,
                original_max_position_embeddings=draw.pick(64, 128, 256),
                beta_fast=draw.pick(32.0, 8.0, 4.0),
                beta_slow=draw.pick(1.0, 0.5, 2.0),
                attention_factor=draw.pick(None, 1.0, 1.3),
                truncate=draw.pick(True, False),
            )
        case 4:
            return RopeScaling(
                "llama3",
                factor,
                original_max_position_embeddings=draw.pick(16, 64, 128),
                low_freq_factor=draw.pick(1.0, 2.0),
                high_freq_factor=draw.pick(4.0, 8.0),
            )
    return None


def random_params(config: LlamaConfig, draw: Draw) -> dict[str, Any]:
    """Parameters at which every setting shows in the logits.

    Projections are wide enough for peaked attention (rotary errors show), the embedding is narrow
    (so the norms' epsilon shows), and no norm scale is one (so a forgotten scale shows).
    """
    layers, d, f = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    n, k, h = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def scale(*shape: int) -> dict[str, np.ndarray]:
        return {"scale": draw.uniform(shape, std=0.3, mean=1.0)}

    params: dict[str, Any] = {
        "embed": {"embedding": draw.uniform((config.vocab_size, d), std=0.05)},
        "layers": {
            "attention_norm": scale(layers, d),
            "attention": {
                "wq": draw.uniform((layers, d, n, h), std=1.5 * d**-0.5),
                "wk": draw.uniform((layers, d, k, h), std=1.5 * d**-0.5),
                "wv": draw.uniform((layers, d, k, h), std=d**-0.5),
                "wo": draw.uniform((layers, n, h, d), std=(n * h) ** -0.5),
            },
            "ffn_norm": scale(layers, d),
            "feed_forward": {
                "w_gate": draw.uniform((layers, d, f), std=d**-0.5),
                "w_up": draw.uniform((layers, d, f), std=d**-0.5),
                "w_down": draw.uniform((layers, f, d), std=f**-0.5),
            },
        },
        "final_norm": scale(d),
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = {"kernel": draw.uniform((d, config.vocab_size), std=d**-0.5)}
    return params


def relative_error(actual: np.ndarray, expected: np.ndarray, valid: np.ndarray | None = None) -> float:
    """The largest |actual - expected| over the largest |expected|, where `valid`."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if valid is not None:
        actual, expected = actual[valid], expected[valid]
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
