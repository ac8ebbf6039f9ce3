"""Training curves of both sides: the same examples, thirty steps of AdamW from the same weights.

Theirs are padded rows, one example each; ours are packed rows of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.golden.cases import Draw
from tests.golden.training import MODEL, params

torch = pytest.importorskip("torch")

STEPS, EXAMPLES, WIDTH = 30, 6, 48
TOLERANCE = 1e-4  # of losses and rewards in nats, and of gradient norms as a fraction
ADAMW = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
Curve = dict[str, list[float]]


def text(draw: Draw, length: int, start: int) -> np.ndarray:
    """Tokens that mostly follow from the one before."""
    noise = draw.integers(0, MODEL.vocab_size, length)
    ruled = draw.integers(0, 8, length) < 6
    out = [start]
    for t in range(length):
        out.append((3 * out[-1] + 1) % MODEL.vocab_size if ruled[t] else noise[t])
    return np.array(out[1:], np.int32)


def conversations() -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """For each step examples of two turns: tokens, and a mask that is 1 in the answers."""
    draw = Draw(11)
    for _ in range(STEPS):
        step = []
        for _ in range(EXAMPLES):
            sizes = draw.integers(2, 7, 4)
            mask = np.repeat([0, 1, 0, 1], sizes).astype(np.int32)
            step.append((text(draw, len(mask), int(draw.integers(0, MODEL.vocab_size, 1)[0])), mask))
        yield step


def preferences() -> Iterator[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """For each step pairs: a prompt, an answer that follows its rule, and one that does not."""
    draw = Draw(12)
    for _ in range(STEPS):
        step = []
        for _ in range(EXAMPLES):
            prompt, chosen, rejected = (int(n) for n in draw.integers(2, 10, 3))
            start = text(draw, prompt, 1)
            wrong = draw.integers(0, MODEL.vocab_size, rejected)
            step.append((start, text(draw, chosen, int(start[-1])), wrong))
        yield step


def packed(examples: list[tuple[np.ndarray, np.ndarray]], together: int) -> dict[str, np.ndarray]:
    """Rows of `together` segments each, one after the other."""
    rows = len(examples) // together
    batch = {
        name: np.zeros((rows, WIDTH), np.int32) for name in ("tokens", "mask", "segment_ids", "positions")
    }
    for row in range(rows):
        at = 0
        for segment, (tokens, mask) in enumerate(examples[row * together :][:together], 1):
            here = row, slice(at, at + len(tokens))
            batch["tokens"][here], batch["mask"][here] = tokens, mask
            batch["segment_ids"][here], batch["positions"][here] = segment, np.arange(len(tokens))
            at += len(tokens)
    return batch


def padded(examples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    """One example a row, as transformers takes them."""
    size = max(len(tokens) for tokens, _ in examples)
    ids, labels, there = (np.full((len(examples), size), fill, np.int64) for fill in (0, -100, 0))
    for row, (tokens, mask) in enumerate(examples):
        ids[row, : len(tokens)], there[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = np.where(mask, tokens, -100)
    arrays = {"input_ids": ids, "labels": labels, "attention_mask": there}
    return {name: torch.tensor(array) for name, array in arrays.items()}


def our_curve(
    loss: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
    weights: Any,
    batches: Iterator[Any],
    learning_rate: float,
) -> Curve:
    """Losses, gradient norms and whatever else `loss` tells of each step of optax's AdamW."""
    rule = optax.adamw(learning_rate, **ADAMW)

    @jax.jit
    def step(weights: Any, state: Any, batch: Any) -> Any:
        (value, told), gradient = jax.value_and_grad(loss, has_aux=True)(weights, batch)
        updates, state = rule.update(gradient, state, weights)
        told = {"loss": value, "grad_norm": optax.tree.norm(gradient), **told}
        return optax.apply_updates(weights, updates), state, told

    state, curve = rule.init(weights), Curve()
    for batch in batches:
        weights, state, told = step(weights, state, batch)
        for name, value in told.items():
            curve.setdefault(name, []).append(float(value))
    return curve


def their_curve(
    loss: Callable[[Any], tuple[Any, dict[str, float]]],
    weights: list[Any],
    batches: Iterator[Any],
    learning_rate: float,
) -> Curve:
    """The same of torch's AdamW."""
    a = ADAMW
    rule = torch.optim.AdamW(
        weights, lr=learning_rate, betas=(a["b1"], a["b2"]), eps=a["eps"], weight_decay=a["weight_decay"]
    )
    curve = Curve()
    for batch in batches:
        value, told = loss(batch)
        rule.zero_grad()
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, float("inf"))
        rule.step()
        for name, number in {"loss": value.item(), "grad_norm": norm.item(), **told}.items():
            curve.setdefault(name, []).append(number)
    return curve


def assert_alike(ours: Curve, theirs: Curve) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        unit = np.abs(expected) if name == "grad_norm" else 1.0
        assert len(expected) == STEPS
        apart = np.abs(np.array(ours[name]) - expected) / unit
        assert apart.max() <= TOLERANCE, (name, apart)


def start() -> Any:
    return jax.tree.map(jnp.asarray, params())
