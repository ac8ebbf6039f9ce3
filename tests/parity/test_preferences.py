"""Live comparison with TRL of SimPO, ORPO and KTO, thirty steps each; DPO is in test_finetuning.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llama_jax.loss import Loss
from llama_jax.train.config.objective import REFERENCE_OBJECTIVES
from llama_jax.train.config.preference import PreferenceConfig
from llama_jax.train.config.run import RunConfig, TrainConfig
from llama_jax.train.objectives import make_metrics_fn
from tests.golden.cases import Draw
from tests.golden.training import MODEL, params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")

from tests.parity import hf  # noqa: E402  (needs torch)
from tests.parity.curves import (  # noqa: E402
    EXAMPLES,
    STEPS,
    Curve,
    assert_alike,
    our_curve,
    packed,
    padded,
    preferences,
    start,
    text,
    their_curve,
)

pytestmark = pytest.mark.parity

Pairs = Iterator[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]


def masked(prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and a mask that is 1 in the answer."""
    mask = np.repeat([0, 1], [len(prompt), len(answer)])
    return np.concatenate([prompt, answer]), mask.astype(np.int32)


def our_objective(objective: str, batches: Any, learning_rate: float = 1e-3, **preference: Any) -> Curve:
    """The curve of an objective of `train.objective`, two segments a row."""
    train = TrainConfig(objective=objective, dtype="float32", attention="xla", loss_chunks=3)
    run = RunConfig(train=train, preference=PreferenceConfig(**preference))
    metrics_fn = make_metrics_fn(run, MODEL, "cpu")
    extras = {"reference": start()} if objective in REFERENCE_OBJECTIVES else {}

    def loss(weights: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, metrics = metrics_fn(weights, batch, **extras)
        return loss.mean, {
            name: value.mean if isinstance(value, Loss) else value / loss.count
            for name, value in metrics.items()
        }

    return our_curve(loss, start(), batches, learning_rate)


def both_answers(pairs: Any) -> dict[str, np.ndarray]:
    return packed([masked(prompt, answer) for prompt, *answers in pairs for answer in answers], 2)


def trainer_of(
    cls: Any, config: Any, folder: Path, row: dict[str, Any], *reference: Any, **settings: Any
) -> Any:
    """A trainer of TRL on our model, whose own data, `row`, is not used."""
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(MODEL.vocab_size)}
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    arguments = config(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **settings,
    )
    return cls(
        hf.model(MODEL, params()).train(),
        *reference,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([row] * 2),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, pad_token="w0", bos_token="w0", eos_token="w0"
        ),
    )


def trl_curve(trainer: Any, batches: Pairs, names: dict[str, str], learning_rate: float = 1e-3) -> Curve:
    """The curve of a trainer, with the metrics `names`, ours by TRL's."""

    def loss(pairs: Any) -> tuple[Any, dict[str, float]]:
        batch = {}
        for which, name in ((1, "chosen"), (2, "rejected")):
            rows = padded([masked(pair[0], pair[which]) for pair in pairs])
            batch |= {f"{name}_{key}": value for key, value in rows.items()}
        value, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
        return value, {ours: float(metrics[theirs]) for theirs, ours in names.items()}

    return their_curve(loss, list(trainer.model.parameters()), batches, learning_rate)


PAIR = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
REWARDS = {"rewards/accuracies": "accuracy", "rewards/margins": "reward_margin"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(smoothing: float, tmp_path: Path) -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    settings = {"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": smoothing}
    trainer = trainer_of(
        cpo.CPOTrainer, cpo.CPOConfig, tmp_path, PAIR, loss_type="simpo", cpo_alpha=0.0, **settings
    )
    theirs = trl_curve(trainer, preferences(), REWARDS)
    ours = our_objective("simpo", map(both_answers, preferences()), **settings)
    assert theirs["loss"][-1] < theirs["loss"][0] - 0.1
    assert_alike(ours, theirs)


def pairs_of_one_length() -> Pairs:
    """Prompts of one token, and in a step chosen answers of one length.

    TRL averages the first term of ORPO's loss over all tokens of the batch's chosen sequences, prompts
    included, where the paper (and this project) averages over each answer's tokens. Here both are the same.
    """
    draw = Draw(13)
    for _ in range(STEPS):
        step, chosen = [], int(draw.integers(3, 10, 1)[0])
        for _ in range(EXAMPLES):
            rejected = int(draw.integers(2, 10, 1)[0])
            first = draw.integers(0, MODEL.vocab_size, 1).astype(np.int32)
            answer = text(draw, chosen, int(first[0]))
            step.append((first, answer, draw.integers(0, MODEL.vocab_size, rejected)))
        yield step


def test_orpo(tmp_path: Path) -> None:
    orpo = pytest.importorskip("trl.experimental.orpo")
    trainer = trainer_of(orpo.ORPOTrainer, orpo.ORPOConfig, tmp_path, PAIR, beta=0.5)
    theirs = trl_curve(trainer, pairs_of_one_length(), {**REWARDS, "nll_loss": "nll"}, 1e-2)
    ours = our_objective("orpo", map(both_answers, pairs_of_one_length()), 1e-2, beta=0.5)
    assert theirs["loss"][-1] < theirs["loss"][0] - 0.5
    assert_alike(ours, theirs)


Labeled = Iterator[list[tuple[np.ndarray, np.ndarray, np.ndarray, bool]]]


def labels() -> Labeled:
    """For each step prompts, each with its completion, another one's completion, and a label."""
    draw = Draw(14)
    for pairs in preferences():
        is_good = draw.integers(0, 2, EXAMPLES) > 0
        is_good[:2] = True, False  # of none TRL reports the last step's reward
        own = [chosen if good else wrong for (_, chosen, wrong), good in zip(pairs, is_good, strict=True)]
        others = [own[-1], *own[:-1]]  # as TRL mismatches them
        prompts = [prompt for prompt, *_ in pairs]
        yield list(zip(prompts, own, others, map(bool, is_good), strict=True))


def labeled_rows(examples: Any) -> dict[str, np.ndarray]:
    """Each example beside its mismatched segment, with the label at both last tokens."""
    batch = packed([masked(prompt, one) for prompt, *both, _ in examples for one in both], 2)
    value = np.zeros(batch["tokens"].shape, np.float32)
    for row, (prompt, own, other, good) in enumerate(examples):
        ends = np.cumsum([len(prompt) + len(own), len(prompt) + len(other)]) - 1
        value[row, ends] = good
    return {**batch, "value": value}


def test_kto(tmp_path: Path) -> None:
    settings = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75}
    row = {"prompt": "w1", "completion": "w2", "label": True}
    reference = hf.model(MODEL, params())
    trainer = trainer_of(trl.KTOTrainer, trl.KTOConfig, tmp_path, row, reference, max_length=None, **settings)

    def their_loss(examples: Any) -> tuple[Any, dict[str, float]]:
        names = ("prompt_ids", "completion_ids", "KL_completion_ids")
        rows = [
            {**dict(zip(names, map(np.ndarray.tolist, parts), strict=True)), "label": good}
            for *parts, good in examples
        ]
        value = trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)
        metrics = trainer._metrics["train"]
        both = {"reward_desirable": "rewards/chosen", "reward_undesirable": "rewards/rejected", "kl": "kl"}
        return value, {ours: metrics[theirs][-1] for ours, theirs in both.items()}

    theirs = their_curve(their_loss, list(trainer.model.parameters()), labels(), 1e-3)
    ours = our_objective("kto", map(labeled_rows, labels()), **settings)
    assert theirs["loss"][-1] < theirs["loss"][0] - 0.1 and max(theirs["kl"]) > 0.01
    assert_alike(ours, theirs)
