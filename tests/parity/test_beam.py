"""Live comparison of beam search with Hugging Face transformers: fresh small models, and SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.decoding.arguments import pad_right
from tests.golden import beams, cases
from tests.golden.beams import Setting

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.golden import make_beams  # noqa: E402  (needs torch)
from tests.parity import hf  # noqa: E402

pytestmark = pytest.mark.parity

FRESH_MODELS = tuple(range(100, 110))
NEW_TOKENS = 32


def assert_found(out: Any, row: int, expected: make_beams.Found) -> None:
    tokens, lengths, scores = expected
    np.testing.assert_array_equal(out.tokens[row], tokens)
    np.testing.assert_array_equal(out.lengths[row], lengths)
    np.testing.assert_allclose(out.scores[row], scores, rtol=beams.TOLERANCE)


def compare(
    reference: Any, model: tuple[Any, Any], prompts: list[list[int]], setting: Setting, new: int
) -> None:
    out = beams.run(*model, *pad_right(prompts), setting, new)
    for row, prompt in enumerate(prompts):
        assert_found(out, row, make_beams.search(reference, prompt, setting, new))


@pytest.mark.parametrize("number", FRESH_MODELS)
def test_small_models(number: int) -> None:
    config, params, tokens = beams.small_model(number)
    reference = hf.model(config, params)
    prompts = [row[:n].tolist() for row, n in zip(tokens, beams.PROMPT_LENGTHS, strict=True)]
    ends = cases.Draw(number).integers(0, config.vocab_size, 4)
    for setting in beams.settings(number, tuple(ends.tolist()), (1, 2, 3)):
        compare(reference, (config, params), prompts, setting, beams.NEW_TOKENS)


@pytest.mark.parametrize("number", beams.MODELS)
def test_the_golden_file_is_what_transformers_says(number: int) -> None:
    config, params, tokens = beams.small_model(number)
    reference = hf.model(config, params)
    with np.load(beams.BEAMS) as golden:
        ends, common, found, scores = (
            golden[f"{name}_{number}"] for name in ("ends", "common", "tokens", "scores")
        )
    for index, setting in enumerate(beams.settings(number, tuple(ends.tolist()), tuple(common.tolist()))):
        for row, length in enumerate(beams.PROMPT_LENGTHS):
            prompt = tokens[row, :length].tolist()
            theirs = make_beams.search(reference, prompt, setting, beams.NEW_TOKENS)
            np.testing.assert_array_equal(found[index, row], theirs[0])
            np.testing.assert_allclose(scores[index, row], theirs[2], rtol=beams.TOLERANCE / 4)


def test_smollm2(smollm2: lj.Model, smollm2_path: Path) -> None:
    with np.load(cases.SMOLLM2) as golden:
        prompts = [golden[f"prompt_{i}"].tolist() for i in (1, 3)]
    reference = hf.load_gguf(smollm2_path, lj.presets.SMOLLM2_135M)
    setting = Setting(4, "never", 1.0, tuple(smollm2.tokenizer.eos_ids), {"repetition_penalty": 1.1})
    compare(reference, (smollm2.config, smollm2.params), prompts, setting, NEW_TOKENS)


@pytest.mark.parametrize("number", range(len(beams.SMOLLM2_SETTINGS)))
def test_smollm2_finds_the_golden_file(smollm2: lj.Model, number: int) -> None:
    """Each setting with a prompt of its own, by the program of the test above."""
    with np.load(cases.SMOLLM2) as file:
        prompt = file[f"prompt_{beams.SMOLLM2_PROMPTS[number]}"].tolist()
    setting = beams.SMOLLM2_SETTINGS[number]
    tokens, lengths = pad_right([prompt, prompt])
    out = beams.run(smollm2.config, smollm2.params, tokens, lengths, setting, beams.SMOLLM2_NEW_TOKENS)
    with np.load(beams.BEAMS) as golden:
        arrays = [golden[f"{name}_smollm2_{number}"][0, number] for name in ("tokens", "lengths", "scores")]
    assert_found(out, 0, (arrays[0], arrays[1], arrays[2]))
