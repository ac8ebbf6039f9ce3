"""The small run behind the golden loss curve: its weights and batches, and how this trainer runs it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import LlamaConfig, init
from llama_jax.train.config.run import OptimizerConfig, RunConfig, TrainConfig
from llama_jax.train.optimizer import make_optimizer, make_schedule
from llama_jax.train.state import create_state
from llama_jax.train.step import build_step
from tests.golden.cases import GOLDEN, Draw

CURVE = GOLDEN / "training.json"
# The largest difference of a step's loss, in nats, and of its gradient's norm, as a fraction: ten times
# what the order of summation makes of 50 steps.
TOLERANCE = 2e-5

MODEL = LlamaConfig(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    max_position_embeddings=64,
)
TRAIN = TrainConfig(
    steps=50,
    global_batch_size=4,
    seq_len=24,
    dtype="float32",
    attention="blockwise",
    remat="full",
    loss_chunks=5,
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=10)


def params() -> Any:
    """The weights that training begins with, numpy f32, layers stacked; no norm scale is one."""
    draw = Draw(7)
    shapes = jax.eval_shape(lambda key: init(MODEL, key), jax.random.key(0))

    def leaf(path: tuple[Any, ...], like: jax.ShapeDtypeStruct) -> np.ndarray:
        return draw.uniform(like.shape, std=0.05, mean=1.0 if path[-1].key == "scale" else 0.0)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """A batch a step: tokens int32 [B, T], and their rows' lengths int32 [B].

    There is something to learn: most tokens follow from the one before by one of two affine rules. What
    is past a row's length is padding, unevenly, so that microbatches have different counts.
    """
    draw, shape = Draw(8), (TRAIN.global_batch_size, TRAIN.seq_len)
    out = []
    for _ in range(TRAIN.steps):
        noise = draw.integers(0, MODEL.vocab_size, shape[0] * shape[1]).reshape(shape)
        rule = draw.integers(0, 8, shape[0] * shape[1]).reshape(shape)
        lengths = draw.integers(shape[1] // 3, shape[1] + 1, shape[0])
        tokens = noise.copy()
        for t in range(1, shape[1]):
            before = tokens[:, t - 1]
            ruled = np.where(rule[:, t] < 5, 3 * before + 1, before + 7) % MODEL.vocab_size
            tokens[:, t] = np.where(rule[:, t] == 7, noise[:, t], ruled)
        out.append((tokens.astype(np.int32), lengths))
    return out


def our_curve(optimizer: OptimizerConfig = OPTIMIZER, **changes: Any) -> dict[str, np.ndarray]:
    """`loss` and `grad_norm` [steps] of the trainer's own step; `changes` are of the train section."""
    run = RunConfig(train=dataclasses.replace(TRAIN, **changes), optimizer=optimizer)
    step, abstract, abstract_batch, _ = build_step(run, MODEL, None, "cpu")
    compiled = step.lower(abstract, abstract_batch).compile()
    rule = make_optimizer(run.optimizer, make_schedule(run.optimizer, run.train.steps))
    state = create_state(MODEL, rule, 0, jax.tree.map(jnp.asarray, params()))
    curve: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for tokens, lengths in batches():
        positions = np.broadcast_to(np.arange(TRAIN.seq_len, dtype=np.int32), tokens.shape)
        segments = (positions < lengths[:, None]).astype(np.int32)
        batch = {"tokens": tokens, "segment_ids": segments, "positions": positions}
        state, metrics = compiled(state, jax.tree.map(jnp.asarray, batch))
        for name, values in curve.items():
            values.append(float(getattr(metrics, name)))
    return {name: np.array(values) for name, values in curve.items()}


def difference(curve: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest difference of two curves, in the units of `TOLERANCE`."""
    loss = np.abs(curve["loss"] - expected["loss"]).max()
    return float(np.maximum(loss, np.abs(curve["grad_norm"] / expected["grad_norm"] - 1).max()))


def golden_curve() -> dict[str, np.ndarray]:
    """The reference's curve, from the file."""
    return {name: np.array(values) for name, values in json.loads(CURVE.read_text()).items()}
