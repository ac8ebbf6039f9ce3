"""SmolLM2-135M, with its published weights, equals Hugging Face transformers (golden file)."""

from __future__ import annotations

import io
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import cli
from llama_jax.decoding.session import Session
from llama_jax.tokenizer import load_tokenizer
from tests.golden import cases

pytestmark = pytest.mark.slow

PROMPTS = 5
NEW = 8
# Ids are stored in 16 bits.
_WIDE = {np.dtype(np.uint16): np.dtype(np.int32)}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(cases.SMOLLM2) as file:
        return {name: array.astype(_WIDE.get(array.dtype, array.dtype)) for name, array in file.items()}


def test_logits_over_a_page(smollm2: lj.Model, golden: dict[str, np.ndarray]) -> None:
    forward = jax.jit(partial(lj.forward, smollm2.config))
    logits = np.asarray(forward(smollm2.params, golden["prose"][None]))[0]
    scale = golden["scale"]
    sample = logits[np.ix_(golden["positions"], golden["columns"])]
    assert np.abs(sample - golden["logits"]).max() / scale <= cases.TOLERANCE
    logsumexp = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    assert np.abs(logsumexp - golden["logsumexp"]).max() / scale <= cases.TOLERANCE
    # Positions where the two best logits are closer than the tolerance may differ.
    clear = golden["top1_margin"] > 2 * cases.TOLERANCE * scale
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(logits.argmax(-1)[clear], golden["top1"][clear])


def test_greedy_continuations(smollm2: lj.Model, golden: dict[str, np.ndarray]) -> None:
    """By a session, which compiles what the chat below runs; a parity test takes all 128 of `generate`."""
    session = Session(smollm2.config, smollm2.params)
    for number in range(PROMPTS):
        prompt, greedy = golden[f"prompt_{number}"].tolist(), golden[f"greedy_{number}"][:NEW].tolist()
        sampling = lj.Sampling(temperature=0.0)
        assert list(session.stream(prompt, jax.random.key(0), sampling, max_new_tokens=NEW)) == greedy


def test_a_chat_answers_over_two_turns(
    smollm2_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = b"What is the capital of France?\nAnd of Italy?\n"
    fake = SimpleNamespace(buffer=io.BytesIO(questions), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", fake)
    assert cli.main(["chat", "smollm2-135m", "--max-new-tokens", "12", "--json"]) == 0
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert err == ""
    assert "Paris" in first["assistant"]
    assert "Rome" in second["assistant"]
    answer = load_tokenizer(smollm2_path).encode(first["assistant"])
    assert second["reused_tokens"] == first["prompt_tokens"] + len(answer)
