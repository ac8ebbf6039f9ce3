"""Live comparison of finetuning with torch: thirty steps each of SFT, adapters and DPO, number by number.

The reference is plain transformers for supervised finetuning, PEFT for adapters, and TRL's DPOTrainer for
preferences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.adapters import lora
from llama_jax.loss import token_logprobs
from llama_jax.train.objectives.preference import dpo_loss
from llama_jax.weights.adapters import load_adapter
from tests.golden.training import MODEL, params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.parity import hf  # noqa: E402  (needs torch)
from tests.parity.curves import (  # noqa: E402
    assert_alike,
    conversations,
    our_curve,
    packed,
    padded,
    preferences,
    start,
    their_curve,
)

pytestmark = pytest.mark.parity


def supervised(weights: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    return lj.next_token_loss(MODEL, weights, **batch).mean, {}


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
