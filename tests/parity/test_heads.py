"""Live comparison with transformers and PEFT: classifiers and reward models give the same numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.adapters import lora, prefix
from llama_jax.text.convert import convert
from llama_jax.text.model import Model
from llama_jax.tokenizer import load_tokenizer
from llama_jax.train.scorer import Scorer
from llama_jax.weights.derived import Head
from llama_jax.weights.write.adapters import save_adapter
from tests import tiny
from tests.golden.cases import relative_error
from tests.random_models import random_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5  # relative to the largest number
TEXTS = ["a", "the cab is a dab hand at it", "feed the bad cafe", "", "ab ab ab ab ab ab ab"]
LABELS = ("bird", "beast", "fish")


def model_of(folder: Path, labels: tuple[str, ...], *, tied: bool = False) -> Model:
    tiny.write_vocabulary(folder / "tok.bin", tiny.PIECES)
    config = tiny.CONFIG.replace(tie_word_embeddings=tied, labels=labels)
    return Model(config, random_model(7, config)[1], load_tokenizer(folder / "tok.bin"), folder)


def theirs(path: Path, model: object = None) -> tuple[np.ndarray, object]:
    """What transformers says of the texts in one batch, padded as its tokenizer pads."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    kind = transformers.AutoModelForSequenceClassification
    model = model or kind.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.numpy(), model


@pytest.mark.parametrize("labels", [LABELS, ("LABEL_0",), ("LABEL_0", "LABEL_1")], ids=len)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_we_write_gives_our_numbers_there(labels: tuple[str, ...], tied: bool, tmp_path: Path) -> None:
    path = lj.save(model_of(tmp_path, labels, tied=tied), tmp_path / "ours")
    expected, model = theirs(path)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert tuple(model.config.id2label.values()) == labels
    assert relative_error(Scorer.load(path).scores(TEXTS), expected) < TOLERANCE
    # And what it writes is what we read.
    model.save_pretrained(tmp_path / "theirs")
    again = lj.load(convert(tmp_path / "theirs", tmp_path / "again", tokenizer=path))
    assert again.config == lj.load(path).config
    jax.tree.map(np.testing.assert_array_equal, again.params, lj.load(path).params)


def test_adapters_with_heads_go_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    language, classifier = model_of(tmp_path, ()), model_of(tmp_path, LABELS)
    base = lj.save(language, tmp_path / "base")
    kind = transformers.AutoModelForSequenceClassification

    def their_base() -> object:
        return kind.from_pretrained(base, num_labels=3, pad_token_id=0, dtype=torch.float32)

    settings = lora.Lora(rank=4, alpha=6)
    adapter = lora.init(settings, language.params, jax.random.key(0))
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    head = Head(np.asarray(classifier.params["score"]["kernel"]).T, LABELS)
    ours = save_adapter(tmp_path / "ours", settings, adapter, language.config, head=head)
    merged = convert(base, tmp_path / "merged", adapter=ours)
    found = Scorer.load(merged).scores(TEXTS)
    expected, _ = theirs(merged, peft.PeftModel.from_pretrained(their_base(), ours).eval())
    assert relative_error(found, expected) < TOLERANCE

    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="SEQ_CLS", target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(their_base(), config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(tmp_path / "theirs")
    whole = convert(base, tmp_path / "whole", adapter=tmp_path / "theirs")
    expected, _ = theirs(whole, model)
    assert relative_error(Scorer.load(whole).scores(TEXTS), expected) < TOLERANCE


def test_prefixes_with_heads_go_both_ways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    language, classifier = model_of(tmp_path, ()), model_of(tmp_path, LABELS)
    base, scorer = lj.save(language, tmp_path / "base"), Scorer.load(lj.save(classifier, tmp_path / "c"))
    kind = transformers.AutoModelForSequenceClassification
    padded = tmp_path / "c"  # whose tokenizer has a token to pad with

    def their_base() -> object:
        return kind.from_pretrained(base, num_labels=3, pad_token_id=0, dtype=torch.float32)

    def ours(adapter: Path) -> np.ndarray:
        return dataclasses.replace(scorer, model=lj.load(base, adapter=adapter)).scores(TEXTS)

    settings = prefix.Prefix(3)
    adapter = prefix.init(settings, language.config, language.params, jax.random.key(0))
    head = Head(np.asarray(classifier.params["score"]["kernel"]).T, LABELS)
    path = save_adapter(tmp_path / "ours", settings, adapter, language.config, head=head)
    expected, _ = theirs(padded, peft.PeftModel.from_pretrained(their_base(), path).eval())
    assert relative_error(ours(path), expected) < TOLERANCE

    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = peft.get_peft_model(their_base(), config).eval()
    model.save_pretrained(tmp_path / "theirs")
    expected, _ = theirs(padded, model)
    assert relative_error(ours(tmp_path / "theirs"), expected) < TOLERANCE
