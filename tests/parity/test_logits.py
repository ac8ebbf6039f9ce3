"""Live comparison with Hugging Face transformers: logits and gradients of small models, and SmolLM2."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.decoding.arguments import pad_right
from tests.golden import cases, text

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.parity import hf  # noqa: E402  (needs torch)

pytestmark = pytest.mark.parity

FRESH_SEEDS = tuple(range(100, 110))
GRADIENT_SEEDS = (0, 1, 2, 3, 4, 8)
NEW_TOKENS = 128


@pytest.mark.parametrize("seed", cases.SEEDS + FRESH_SEEDS)
def test_forward(seed: int) -> None:
    case = cases.random_case(seed)
    with torch.inference_mode():
        expected = hf.case_logits(hf.case_model(case), case).numpy()
    forward = jax.jit(partial(lj.forward, case.config))
    logits = forward(case.params, case.tokens, case.positions, case.segment_ids)
    assert cases.relative_error(logits, expected, case.valid) <= cases.TOLERANCE


@pytest.mark.parametrize("seed", cases.SEEDS)
def test_the_golden_file_is_what_transformers_says(seed: int) -> None:
    case = cases.random_case(seed)
    with torch.inference_mode():
        expected = hf.case_logits(hf.case_model(case), case).numpy()
    with np.load(cases.SMALL_MODELS) as golden:
        assert cases.relative_error(golden[f"logits_{seed}"], expected, case.valid) <= cases.TOLERANCE / 4


@pytest.mark.parametrize("seed", GRADIENT_SEEDS)
def test_gradient_of_the_loss(seed: int) -> None:
    case = cases.random_case(seed)

    def loss(params: Any) -> jax.Array:
        return lj.next_token_loss(
            case.config, params, case.tokens, case.valid, case.positions, case.segment_ids
        ).mean

    value, gradient = jax.jit(jax.value_and_grad(loss))(case.params)

    segments = np.ones_like(case.tokens) if case.segment_ids is None else case.segment_ids
    counted = torch.tensor(case.valid[:, 1:] & (segments[:, 1:] == segments[:, :-1]))
    model = hf.case_model(case)
    targets = torch.tensor(case.tokens[:, 1:], dtype=torch.int64)
    logits = hf.case_logits(model, case)[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits[counted], targets[counted])
    expected.backward()

    assert abs(float(value) - expected.item()) <= cases.TOLERANCE * expected.item()
    ours = hf.state_dict(jax.tree.map(np.asarray, gradient))
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    errors = {name: cases.relative_error(ours[name], theirs[name]) for name in ours}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= cases.TOLERANCE, worst


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    return hf.load_gguf(smollm2_path, lj.presets.SMOLLM2_135M)


@pytest.fixture(scope="module")
def encode(smollm2_path: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    return lambda words: tokenizer(words, add_special_tokens=False).input_ids


def test_smollm2_over_512_tokens(smollm2: lj.Model, reference: Any, encode: Any, shared_data: Path) -> None:
    play = (shared_data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    tokens = np.array(encode(play[:4000])[:512], np.int32)[None]
    assert tokens.shape == (1, 512)
    with torch.inference_mode():
        expected = reference(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    logits = np.asarray(jax.jit(partial(lj.forward, smollm2.config))(smollm2.params, tokens))
    assert cases.relative_error(logits, expected) <= cases.TOLERANCE
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def test_smollm2_greedy_continuations(smollm2: lj.Model, reference: Any, encode: Any) -> None:
    prompts = [encode(prompt) for prompt in text.PROMPTS]
    out = lj.generate(
        smollm2.config,
        smollm2.params,
        *pad_right(prompts),
        jax.random.key(0),
        lj.Sampling(temperature=0.0),
        max_new_tokens=NEW_TOKENS,
    )
    for ids, ours in zip(prompts, np.asarray(out.tokens), strict=True):
        assert ours.tolist() == hf.generate(reference, ids, NEW_TOKENS)
