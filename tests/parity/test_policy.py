"""Live comparison of GRPO's losses with TRL's GRPOTrainer: twenty updates on the same completions.

Theirs are padded rows, one completion each; ours are packed rows of several, through the trainer's own
objective.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.train.config.rl import RLConfig
from llama_jax.train.config.run import ModelConfig, RunConfig, TrainConfig
from llama_jax.train.objectives import make_loss_fn
from llama_jax.train.rl.advantages import group_advantages
from tests.golden.cases import Draw
from tests.golden.training import MODEL, params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

from tests.parity import hf  # noqa: E402  (needs torch)
from tests.parity.curves import our_curve, start, text, their_curve  # noqa: E402

pytestmark = pytest.mark.parity

STEPS, PROMPTS, GROUP, WIDTH, LONGEST = 20, 3, 4, 48, 14
TOLERANCE = 1e-4  # of losses and gradient norms
VARIANTS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.04},
    "dapo": {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 0.03,
        "epsilon_high": 0.04,
        "beta": 0.02,
    },
    "temperature": {
        "loss_type": "dapo",
        "scale_rewards": "batch",
        "beta": 0.1,
        "temperature": 0.7,
        "use_bias_correction_kl": False,
    },
}


def rollouts(scale: str) -> list[dict[str, Any]]:
    """For each step prompts, completions, their old log-probabilities and their advantages."""
    draw, steps = Draw(21), []
    for _ in range(STEPS):
        rewards = draw.uniform((PROMPTS, GROUP), std=1.0)
        advantages = group_advantages(rewards, scale).reshape(-1)
        rows = []
        for row in range(PROMPTS * GROUP):
            prompt, answer = int(draw.integers(2, 10, 1)[0]), int(draw.integers(1, LONGEST + 1, 1)[0])
            ids = text(draw, prompt + answer, 1)
            noise = draw.uniform((prompt + answer,), std=0.15).astype(np.float32)
            rows.append((ids, prompt, noise, advantages[row]))
        steps.append(rows)
    return steps


def our_batch(rows: Any, together: int, temperature: float) -> dict[str, np.ndarray]:
    """Rows of `together` completions; the old policy is the one at the start, with noise."""
    names = ("tokens", "mask", "segment_ids", "positions")
    shape = (len(rows) // together, WIDTH * together // 2)
    batch: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in names}
    batch |= {name: np.zeros(shape, np.float32) for name in ("advantages", "noise")}
    for row in range(shape[0]):
        at = 0
        for segment, (ids, prompt, noise, advantage) in enumerate(rows[row * together :][:together], 1):
            here = row, slice(at, at + len(ids))
            batch["tokens"][here], batch["segment_ids"][here] = ids, segment
            batch["positions"][here], batch["noise"][here] = np.arange(len(ids)), noise
            batch["mask"][row, at + prompt : at + len(ids)] = 1
            batch["advantages"][here] = advantage
            at += len(ids)
    noise = batch.pop("noise")
    batch["old_logprobs"] = np.asarray(initial_logprobs(batch, temperature)) + noise
    return batch


def initial_logprobs(batch: Any, temperature: float) -> jax.Array:
    logits = lj.forward(MODEL, start(), *(batch[name] for name in ("tokens", "positions", "segment_ids")))
    logs = jax.nn.log_softmax(logits[:, :-1] / temperature)
    taken = np.take_along_axis(np.asarray(logs), batch["tokens"][:, 1:, None], 2)[..., 0]
    return np.pad(taken, ((0, 0), (1, 0)))


def their_batch(rows: Any, temperature: float) -> dict[str, Any]:
    """Prompts padded on the left, completions on the right."""
    batch, width = our_batch(rows, 1, temperature), max(prompt for _, prompt, *_ in rows)
    ids = {name: np.zeros((len(rows), width), np.int64) for name in ("prompt_ids", "prompt_mask")}
    ids |= {name: np.zeros((len(rows), LONGEST), np.int64) for name in ("completion_ids", "completion_mask")}
    logs = {name: np.zeros((len(rows), LONGEST), np.float32) for name in ("old", "ref")}
    reference = initial_logprobs(batch, temperature)
    for row, (tokens, prompt, _, _) in enumerate(rows):
        count = len(tokens) - prompt
        ids["prompt_ids"][row, width - prompt :], ids["prompt_mask"][row, width - prompt :] = (
            tokens[:prompt],
            1,
        )
        ids["completion_ids"][row, :count], ids["completion_mask"][row, :count] = tokens[prompt:], 1
        logs["old"][row, :count] = batch["old_logprobs"][row, prompt : len(tokens)]
        logs["ref"][row, :count] = reference[row, prompt : len(tokens)]
    return {
        **{name: torch.tensor(x) for name, x in ids.items()},
        "old_per_token_logps": torch.tensor(logs["old"]),
        "ref_per_token_logps": torch.tensor(logs["ref"]),
        "advantages": torch.tensor(np.array([advantage for *_, advantage in rows])),
        "num_items_in_batch": torch.tensor(float(ids["completion_mask"].sum())),
    }


def their_trainer(folder: Path, beta: float = 0.0, **settings: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(MODEL.vocab_size)}
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        num_generations=GROUP,
        per_device_train_batch_size=PROMPTS * GROUP,
        max_completion_length=LONGEST,
        **settings,
    )
    trainer = trl.GRPOTrainer(
        hf.model(MODEL, params()).train(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "w1"}]),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, pad_token="w0", eos_token="w0"
        ),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.beta = beta  # given to the constructor, it would load a reference model from a path
    return trainer


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_updates_are_those_of_trl(variant: str, tmp_path: Path) -> None:
    settings = VARIANTS[variant]
    temperature = settings.get("temperature", 1.0)
    trainer = their_trainer(tmp_path, **settings)
    steps = rollouts(settings.get("scale_rewards", "group"))

    def their_loss(rows: Any) -> tuple[Any, dict[str, float]]:
        value = trainer._compute_loss(trainer.model, their_batch(rows, temperature))
        told = trainer._metrics["train"]
        return value, {"clipped": told["clip_ratio/region_mean"][-1], "entropy": told["entropy"][-1]}

    theirs = their_curve(their_loss, list(trainer.model.parameters()), iter(steps), 1e-3)
    compute = {"dtype": "float32", "remat": "none", "attention": "xla", "loss_chunks": 2}
    run = RunConfig(
        model=ModelConfig(init_from="somewhere"),
        train=TrainConfig(objective="grpo", global_batch_size=PROMPTS * GROUP, seq_len=WIDTH, **compute),
        rl=RLConfig(
            rewards=("exact_match",), num_generations=GROUP, max_completion_length=LONGEST, **settings
        ),
    )
    loss_fn, reference = make_loss_fn(run, MODEL, "cpu"), start()

    def our_loss(weights: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss = loss_fn(weights, batch, **({"reference": reference} if run.rl.beta else {}))
        tokens = loss.metrics["tokens"]
        return loss.mean, {
            "clipped": loss.metrics["clip_fraction"] / tokens,
            "entropy": loss.metrics["entropy"] / tokens,
        }

    ours = our_curve(our_loss, start(), (our_batch(rows, 2, temperature) for rows in steps), 1e-3)
    assert ours.keys() == theirs.keys()
    assert max(theirs["clipped"]) > 0.02
    if run.rl.importance_sampling_level == "sequence":
        del ours["clipped"], theirs["clipped"]  # theirs is a mean over completions
    for name, expected in theirs.items():
        assert len(expected) == STEPS
        apart = np.abs(np.array(ours[name]) - expected) / np.maximum(1.0, np.abs(expected))
        assert apart.max() <= TOLERANCE, (name, apart)
