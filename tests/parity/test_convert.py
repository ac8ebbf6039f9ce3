"""Live comparison with Hugging Face transformers: it loads what we convert, and writes our greedy text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.text.convert import convert
from tests.golden import text

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
