"""Live comparison of finetuning with torch: thirty steps each of SFT, adapters and DPO, number by number.

The reference is plain transformers for supervised finetuning, PEFT for adapters, and TRL's DPOTrainer for
preferences.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.adapters import lora
from llama_jax.loss import token_logprobs
from llama_jax.train.config.preference import PreferenceConfig
from llama_jax.train.config.train import TrainConfig
from llama_jax.train.objectives.preference import direct_preference, dpo_loss
from llama_jax.weights.adapters import load_adapter
from tests.golden.training import MODEL, params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from tests.parity import hf  # noqa: E402  (needs torch)
from tests.parity.curves import (  # noqa: E402
    TOLERANCE,
    assert_alike,
    conversations,
    our_curve,
    packed,
    padded,
    preferences,
    start,
    their_curve,
)
from tests.parity.kin import close, make  # noqa: E402  (needs torch)

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
MIXTURE = {"vocab_size": MODEL.vocab_size, "num_hidden_layers": 2, "head_dim": 16, "num_local_experts": 4}
MIXTURE |= {"num_experts_per_tok": 2, "sliding_window": None}
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


def trl_trainer(folder: Path, model: Any = None, **settings: Any) -> Any:
    """TRL's trainer of a model of transformers, by default ours, with a second copy as the reference."""
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
    model = hf.model(MODEL, params()) if model is None else model
    return trl.DPOTrainer(
        model.train(),
        copy.deepcopy(model).eval(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "w1", "chosen": "w2", "rejected": "w3"}]),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=vocabulary, pad_token="w0", eos_token="w0"
        ),
    )


def trl_loss(trainer: Any, pairs: Any) -> Any:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, map(np.ndarray.tolist, pair), strict=True)) for pair in pairs]
    return trainer._compute_loss(trainer.model, trainer.data_collator(rows), False)


def both(pairs: Any) -> dict[str, np.ndarray]:
    """A row for each pair: the prompt with either answer."""
    segments = [
        (np.concatenate([prompt, answer]), np.repeat([0, 1], [len(prompt), len(answer)]).astype(np.int32))
        for prompt, *answers in pairs
        for answer in answers
    ]
    return packed(segments, 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_preferences(variant: str, tmp_path: Path) -> None:
    ours_has, theirs_has = VARIANTS[variant]
    trainer = trl_trainer(tmp_path, **theirs_has)

    def their_loss(pairs: Any) -> tuple[Any, dict[str, float]]:
        value = trl_loss(trainer, pairs)
        told = trainer._metrics["train"]
        return value, {name: told[f"rewards/{name}"][-1] for name in ("chosen", "rejected")}

    theirs = their_curve(their_loss, list(trainer.model.parameters()), preferences(), 1e-3)

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


def test_preferences_of_a_mixture(tmp_path: Path) -> None:
    """The loss of one batch with the load-balancing part, and the gradient of the routers."""
    loaded = make("Mixtral", MIXTURE, tmp_path / "policy")
    trainer = trl_trainer(tmp_path, loaded.model, router_aux_loss_coef=0.3, loss_type=["sigmoid"])
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.01 * torch.ones_like(weight))
    trainer.model.save_pretrained(tmp_path / "moved")
    _, policy = lj.load_params(tmp_path / "moved")
    pairs = next(preferences())
    expected = trl_loss(trainer, pairs)
    expected.backward()
    train = TrainConfig(objective="dpo", router_aux_loss_coef=0.3, dtype="float32", attention="xla")
    loss_fn = direct_preference(loaded.config, train, "cpu", PreferenceConfig(beta=BETA))

    def mean(params: Any) -> jax.Array:
        return loss_fn(params, both(pairs), reference=loaded.params)[0].mean

    value, gradient = jax.jit(jax.value_and_grad(mean))(policy)
    assert abs(float(value) - expected.item()) < TOLERANCE
    (balance,) = trainer._metrics["train"]["aux_loss"]
    assert balance > 1.0 and abs(float(value) - 0.3 * balance - np.log(2)) > 1e-3
    for layer, block in enumerate(trainer.model.model.layers):
        found = gradient["layers"]["feed_forward"]["router"][layer].T
        close(found, block.mlp.gate.weight.grad, TOLERANCE)
