"""Live comparison of PPO with `tests/golden/ppo.py`: twenty updates on the same completions and scores.

Theirs are padded rows in torch, from transformers' logits and hidden states; ours are packed rows of several,
through the trainer's own arithmetic and objective.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.train.config.rl import RLConfig
from llama_jax.train.config.run import ModelConfig, RunConfig, TrainConfig
from llama_jax.train.objectives import make_loss_fn
from llama_jax.train.rl.critic import add_advantages
from tests.golden.cases import Draw
from tests.golden.training import MODEL, params

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.golden import ppo  # noqa: E402  (needs torch)
from tests.parity import hf  # noqa: E402
from tests.parity.curves import our_curve, start, text, their_curve  # noqa: E402

pytestmark = pytest.mark.parity

STEPS, COUNT, WIDTH, LONGEST = 20, 12, 48, 14
TOLERANCE = 1e-4
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama2": (
        {"beta": 0.01, "whiten": "scores", "gae_lambda": 0.9},
        {"kl_coef": 0.01, "whiten_scores": True, "lam": 0.9},
    ),
    "trl": (
        {"beta": 0.05, "whiten": "rewards", "cliprange_value": 0.1, "vf_coef": 0.5, "gamma": 0.98},
        {"kl_coef": 0.05, "whiten_rewards": True, "cliprange_value": 0.1, "vf_coef": 0.5, "gamma": 0.98},
    ),
    "temperature": (
        {"beta": 0.1, "whiten": "none", "temperature": 0.7, "epsilon": 0.1},
        {"kl_coef": 0.1, "cliprange": 0.1},
    ),
}


def head() -> np.ndarray:
    return Draw(31).uniform((MODEL.hidden_size, 1), std=0.3).astype(np.float32)


def rollouts() -> list[list[dict[str, Any]]]:
    """For each step completions: tokens, where they begin, their score, and noise for what sampling found."""
    draw, steps = Draw(22), []
    for _ in range(STEPS):
        rows = []
        for _ in range(COUNT):
            prompt, answer = int(draw.integers(2, 10, 1)[0]), int(draw.integers(1, LONGEST + 1, 1)[0])
            noise = {name: draw.uniform((LONGEST,), std=std) for name, std in NOISE.items()}
            rows.append(
                {
                    "ids": text(draw, prompt + answer, 1),
                    "prompt": prompt,
                    "score": float(draw.uniform((1,), std=2.0)[0]),
                    **{name: x[:answer].astype(np.float32) for name, x in noise.items()},
                }
            )
        steps.append(rows)
    return steps


NOISE = {"logprobs": 0.15, "reference": 0.3, "values": 0.4}


class Theirs:
    """Log-probabilities and values of completions, [B, C], by transformers' model and a head."""

    def __init__(self, temperature: float) -> None:
        self.model, self.temperature = hf.model(MODEL, params()).train(), temperature
        self.head = torch.nn.Parameter(torch.tensor(head()))

    def __call__(self, rows: Any) -> tuple[Any, Any]:
        ids = torch.zeros((len(rows), WIDTH), dtype=torch.long)
        there = torch.zeros((len(rows), WIDTH), dtype=torch.long)
        for row, one in enumerate(rows):
            ids[row, : len(one["ids"])], there[row, : len(one["ids"])] = (
                torch.tensor(one["ids"].astype(int)),
                1,
            )
        out = self.model(input_ids=ids, attention_mask=there, output_hidden_states=True)
        logs = torch.log_softmax(out.logits / self.temperature, -1)[:, :-1].gather(2, ids[:, 1:, None])[
            ..., 0
        ]
        values = (out.hidden_states[-1] @ self.head)[..., 0]
        found = []
        for x in (logs, values[:, :-1]):  # entry t of both is of token t + 1
            lines = [x[row, one["prompt"] - 1 : len(one["ids"]) - 1] for row, one in enumerate(rows)]
            found.append(
                torch.nn.utils.rnn.pad_sequence([*lines, torch.zeros(LONGEST)], batch_first=True)[:-1]
            )
        return found[0], found[1]


def padded(rows: Any, name: str) -> np.ndarray:
    return np.stack([np.pad(one[name], (0, LONGEST - len(one[name]))) for one in rows])


def packed(
    rows: Any, initial: tuple[np.ndarray, np.ndarray], together: int, rl: RLConfig
) -> dict[str, np.ndarray]:
    """Rows of `together` completions, with what the trainer makes of their scores."""
    shape = (len(rows), WIDTH)
    whole = {name: np.zeros(shape, np.int32) for name in ("tokens", "mask", "segment_ids", "positions")}
    floats = {name: np.zeros(shape, np.float32) for name in ("old_logprobs", "reference", "values")}
    for row, one in enumerate(rows):
        count, prompt = len(one["ids"]), one["prompt"]
        whole["tokens"][row, :count], whole["segment_ids"][row, :count] = one["ids"], 1
        whole["positions"][row, :count], whole["mask"][row, prompt:count] = np.arange(count), 1
        logs, values = (x[row, : count - prompt] for x in initial)
        floats["old_logprobs"][row, prompt:count] = logs + one["logprobs"]
        floats["reference"][row, prompt:count] = logs + one["reference"]
        floats["values"][row, prompt:count] = values + one["values"]
    arrays = {**whole, "old_logprobs": floats["old_logprobs"]}
    scores = np.array([one["score"] for one in rows])
    add_advantages(arrays, scores, floats["values"], floats["reference"], rl)
    batch = {
        name: np.zeros((len(rows) // together, WIDTH * together // 2), x.dtype) for name, x in arrays.items()
    }
    for row in range(len(rows) // together):
        at = 0
        for segment, one in enumerate(range(row * together, (row + 1) * together), 1):
            count = len(rows[one]["ids"])
            for name, x in arrays.items():
                batch[name][row, at : at + count] = x[one, :count]
            batch["segment_ids"][row, at : at + count] = segment
            at += count
    return batch


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_updates_are_those_of_the_reference(variant: str) -> None:
    ours_set, theirs_set = VARIANTS[variant]
    run = RunConfig(
        model=ModelConfig(init_from="somewhere"),
        train=TrainConfig(
            objective="ppo",
            global_batch_size=COUNT,
            seq_len=WIDTH,
            dtype="float32",
            remat="none",
            attention="xla",
            loss_chunks=2,
        ),
        rl=RLConfig(rewards=("exact_match",), num_generations=1, max_completion_length=LONGEST, **ours_set),
    )
    settings, theirs = ppo.Settings(**theirs_set), Theirs(run.rl.temperature)
    steps = rollouts()
    with torch.no_grad():
        initial = [tuple(x.numpy() for x in theirs(rows)) for rows in steps]

    def their_loss(step: int) -> tuple[Any, dict[str, float]]:
        rows, (logs, values) = steps[step], initial[step]
        mask = torch.tensor(padded([{"m": np.ones(len(one["values"]))} for one in rows], "m")).float()
        old, reference = (torch.tensor(logs + padded(rows, name)) for name in ("logprobs", "reference"))
        old_values = torch.tensor(values + padded(rows, "values"))
        scores = torch.tensor([one["score"] for one in rows])
        advantages, returns = ppo.targets(scores, old, reference, old_values, mask, settings)
        return ppo.loss(*theirs(rows), old, old_values, advantages, returns, mask, settings)

    parameters = [*theirs.model.parameters(), theirs.head]
    expected = their_curve(their_loss, parameters, iter(range(STEPS)), 1e-3)
    loss_fn = make_loss_fn(run, MODEL, "cpu")

    def our_loss(weights: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = loss_fn(weights, batch)
        names = {"clipped": "clip_fraction", "value_clipped": "value_clip_fraction"}
        return loss.mean, {ours: loss.metrics[name] / loss.metrics["tokens"] for ours, name in names.items()}

    weights = {**start(), "value": {"kernel": jnp.asarray(head())}}
    batches = (packed(rows, initial[i], 2, run.rl) for i, rows in enumerate(steps))
    found = our_curve(our_loss, weights, batches, 1e-3)
    assert found.keys() == expected.keys()
    assert max(expected["clipped"]) > 0.02 and max(expected["value_clipped"]) > 0.02
    for name, values in expected.items():
        assert len(values) == STEPS
        apart = np.abs(np.array(found[name]) - values) / np.maximum(1.0, np.abs(values))
        assert apart.max() <= TOLERANCE, (name, apart)
