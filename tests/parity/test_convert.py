"""Live comparison with Hugging Face transformers: it loads what we convert, and writes our greedy text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.text.convert import convert
from llama_jax.train.config.rope_scaling import RopeScalingConfig
from llama_jax.train.config.run import ModelConfig
from tests import tiny
from tests.golden import text
from tests.random_models import random_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

NEW_TOKENS = 48


@pytest.mark.parametrize("way", [("hf",), ("meta", "gguf", "hf"), ("orbax", "hf")], ids="-".join)
def test_smollm2_is_loaded_and_writes_our_text(
    way: tuple[str, ...], tmp_path: Path, smollm2: lj.Model, smollm2_path: Path
) -> None:
    path = smollm2_path
    for step, format in enumerate(way):
        path = convert(path, tmp_path / str(step), format)  # type: ignore[arg-type]
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for prompt in text.PROMPTS[:2]:
        ids = tokenizer(prompt, return_tensors="pt")
        assert ids["input_ids"][0].tolist() == smollm2.tokenizer.encode(prompt)
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)
        theirs = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert theirs == smollm2.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0.0)


@pytest.mark.parametrize("kv_heads", [3, 1])
def test_pooled_heads_are_the_model_that_transformers_runs(
    kv_heads: int, tmp_path: Path, smollm2: lj.Model, smollm2_path: Path
) -> None:
    path = convert(smollm2_path, tmp_path / "out", kv_heads=kv_heads)
    ids = np.asarray([smollm2.tokenizer.encode(text.PROMPTS[0])])
    ours = lj.load(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    found = np.asarray(lj.forward(ours.config, ours.params, ids))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
def test_an_extended_model_is_the_one_that_transformers_runs(kind: str, tmp_path: Path) -> None:
    """As a run configures it: `factor` alone, on a model of 32 tokens; its written config.json, at 200."""
    base, params = random_model(3, tiny.CONFIG)
    scaling = RopeScalingConfig(kind, factor=8.0)  # type: ignore[arg-type]
    config = ModelConfig(init_from="base", rope_scaling=scaling).extended(base)
    path = lj.save(config, params, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert theirs.config.max_position_embeddings == 256
    ids = np.random.default_rng(0).integers(3, base.vocab_size, (2, 200))
    with torch.inference_mode():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    found = np.asarray(lj.forward(config, params, ids))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert lj.load_params(path)[0].max_position_embeddings == 256
    unscaled = np.asarray(lj.forward(base, params, ids))
    assert np.abs(unscaled - expected).max() > 1e-3 * np.abs(expected).max()
