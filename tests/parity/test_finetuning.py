"""Live comparison of finetuning with torch: thirty steps each of SFT, adapters and DPO, number by number.

The reference is plain transformers for supervised finetuning, PEFT for adapters, and TRL's DPOTrainer for
preferences. Theirs are padded rows, one example each; ours are packed rows of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import llama_jax as lj
from llama_jax.adapters import lora
from llama_jax.loss import token_logprobs
from llama_jax.train.objectives.preference import dpo_loss
from llama_jax.weights.adapters import load_adapter
from tests.golden.cases import Draw
from tests.golden.training import MODEL, params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.parity import hf  # noqa: E402  (needs torch)

pytestmark = pytest.mark.parity

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


def supervised(weights: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return lj.next_token_loss(MODEL, weights, **batch).mean, {}


def start() -> Any:
    return jax.tree.map(jnp.asarray, params())


def test_supervised_finetuning() -> None:
    model = hf.model(MODEL, params()).train()
    theirs = their_curve(
        lambda batch: (model(**batch, use_cache=False).loss, {}),
        list(model.parameters()),
        map(padded, conversations()),
        1e-2,
    )
    ours = our_curve(supervised, start(), (packed(examples, 2) for examples in conversations()), 1e-2)
    assert theirs["loss"][-1] < theirs["loss"][0] - 0.5
    assert_alike(ours, theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": ["k_proj", "o_proj", "up_proj", "down_proj"], "use_dora": True},
    ],
    ids=["lora", "rslora", "dora"],
)
def test_adapters(settings: dict[str, Any], tmp_path: Path) -> None:
    """From PEFT's own first adapter, which is read from the files that it writes."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(hf.model(MODEL, params()), config).train()
    model.save_pretrained(tmp_path)
    found, adapter = load_adapter(tmp_path)
    theirs = their_curve(
        lambda batch: (model(**batch, use_cache=False).loss, {}),
        [p for p in model.parameters() if p.requires_grad],
        map(padded, conversations()),
        1e-2,
    )
    base = start()
    ours = our_curve(
        lambda adapter, batch: supervised(lora.attach(found, base, adapter), batch),
        adapter,
        (packed(examples, 2) for examples in conversations()),
        1e-2,
    )
    assert theirs["loss"][-1] < theirs["loss"][0] - 0.1
    assert_alike(ours, theirs)


BETA = 0.3
# TRL has no cDPO loss by that name. With s the sigmoid loss at margin m, and s' at -m, its "robust" loss is
# r = ((1 - e) s - e s') / (1 - 2 e), so that cDPO's (1 - e) s + e s' is 2 (1 - e) s - (1 - 2 e) r.
SMOOTHING = 0.1
VARIANTS = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "ipo": ({"loss_type": "ipo"}, {"loss_type": ["ipo"]}),
    "cdpo": (
        {"label_smoothing": SMOOTHING},
        {
            "loss_type": ["sigmoid", "robust"],
            "loss_weights": [2 * (1 - SMOOTHING), -(1 - 2 * SMOOTHING)],
            "label_smoothing": SMOOTHING,
        },
    ),
}


def trl_trainer(folder: Path, **settings: Any) -> Any:
    """TRL's trainer on our model, with a second copy as the reference."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(MODEL.vocab_size)}
    vocabulary = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    arguments = trl.DPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        beta=BETA,
        max_length=None,
        **settings,
    )
    return trl.DPOTrainer(
        hf.model(MODEL, params()).train(),
        hf.model(MODEL, params()),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}]),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, pad_token="w0", eos_token="w0"
        ),
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_preferences(variant: str, tmp_path: Path) -> None:
    ours_has, theirs_has = VARIANTS[variant]
    trainer = trl_trainer(tmp_path, **theirs_has)

    def their_loss(pairs: Any) -> tuple[Any, dict[str, float]]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        batch = trainer.data_collator(
            [dict(zip(names, map(np.ndarray.tolist, pair), strict=True)) for pair in pairs]
        )
        value = trainer._compute_loss(trainer.model, batch, False)
        told = trainer._metrics["train"]
        return value, {name: told[f"rewards/{name}"][-1] for name in ("chosen", "rejected")}

    theirs = their_curve(their_loss, list(trainer.model.parameters()), preferences(), 1e-3)

    def both(pairs: Any) -> dict[str, np.ndarray]:
        segments = [
            (np.concatenate([prompt, answer]), np.repeat([0, 1], [len(prompt), len(answer)]).astype(np.int32))
            for prompt, *answers in pairs
            for answer in answers
        ]
        return packed(segments, 2)

    def answers(weights: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Summed log-probabilities of the chosen and the rejected answers, f32 [P] each."""
        places = batch["tokens"], batch["positions"], batch["segment_ids"]
        logs = token_logprobs(MODEL, weights, *places) * batch["mask"]
        return tuple(jnp.where(batch["segment_ids"] == which, logs, 0).sum(1) for which in (1, 2))

    reference = start()

    def our_loss(weights: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        counts = [((batch["segment_ids"] == which) * batch["mask"]).sum(1) for which in (1, 2)]
        losses, chosen, rejected = dpo_loss(
            *answers(weights, batch),
            *answers(reference, batch),
            beta=BETA,
            lengths=tuple(count.astype(jnp.float32) for count in counts),
            **ours_has,
        )
        return losses.mean(), {"chosen": chosen.mean(), "rejected": rejected.mean()}

    ours = our_curve(our_loss, start(), map(both, preferences()), 1e-3)
    assert theirs["chosen"][-1] > theirs["rejected"][-1] + 0.1
    assert_alike(ours, theirs)
