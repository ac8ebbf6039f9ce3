"""Windows score every token once, as the model does by hand; perplexity is of the whole text."""

from __future__ import annotations

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import llama_jax as lj
from llama_jax.errors import InputError
from llama_jax.eval import windows as windows_module
from llama_jax.eval.perplexity import perplexity
from llama_jax.eval.windows import Window, score_windows, sliding_windows

TEXT = "Once upon a time there was a little girl. She liked to play in the park with her big dog. " * 3


@pytest.fixture(scope="module")
def model(shared_data) -> lj.Model:
    return lj.load(shared_data / "stories260K" / "stories260K.bin")


def by_hand(model: lj.Model, row: list[int], first: int) -> np.ndarray:
    """Log-probabilities of row[first:], each given those before it."""
    logs = jax.nn.log_softmax(lj.forward(model.config, model.params, jnp.array([row])))[0]
    return np.array([logs[place - 1, row[place]] for place in range(first, len(row))])


@hypothesis.given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_every_token_is_scored_once_with_as_much_context_as_fits(count, window, stride, has_prefix):
    stride, ids, prefix = min(stride, window), list(range(1, count + 1)), 0 if has_prefix else None
    found = list(sliding_windows(ids, prefix, window, stride))
    assert [t for w in found for t in w.targets] == ids[0 if has_prefix else 1 :]
    row = ([0] if has_prefix else []) + ids
    for number, (inputs, targets) in enumerate(found):
        assert len(inputs) <= window and len(targets) <= (stride if number else window)
        end = row.index(targets[-1])
        assert inputs == row[max(0, end - window) : end]  # all that fits before the last target
        assert len(targets) == len(inputs) or len(inputs) - len(targets) >= window - stride


def test_scores_are_those_of_the_forward_pass(model):
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 500, size).tolist() for size in (2, 64, 65, 9, 40)]
    counts = [1, 63, 5, 3, 12]
    given = [Window(row[:-1], row[-count:]) for row, count in zip(rows, counts, strict=True)]
    scores = score_windows(model, given, batch_size=2)
    for row, count, score in zip(rows, counts, scores, strict=True):
        np.testing.assert_allclose(score.logprobs, by_hand(model, row, len(row) - count), atol=1e-4)
        logits = lj.forward(model.config, model.params, jnp.array([row]))[0]
        greedy = np.asarray(logits[-count - 1 : -1].argmax(-1)) == row[-count:]
        np.testing.assert_array_equal(score.greedy, greedy)


def test_a_window_does_not_depend_on_the_others_of_its_batch(model):
    rng = np.random.default_rng(1)
    a, *others = (Window(row[:-1], row[1:]) for row in rng.integers(3, 500, (5, 40)).tolist())
    first, second = (score_windows(model, [a, *pair], batch_size=3)[0] for pair in (others[:2], others[2:]))
    np.testing.assert_array_equal(first.logprobs, second.logprobs)
    np.testing.assert_allclose(score_windows(model, [a])[0].logprobs, first.logprobs, atol=1e-5)


def test_perplexity_of_one_window_is_that_of_the_forward_pass(model):
    ids = model.tokenizer.encode(TEXT, add_bos=False)
    found = perplexity(model, TEXT)
    nats = -by_hand(model, [model.tokenizer.bos_id, *ids], 1).sum()
    assert (found.tokens, found.bytes) == (len(ids), len(TEXT))
    assert found.loss == pytest.approx(nats / len(ids), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / len(ids)), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT), rel=1e-5)


def test_windows_of_a_long_text_share_a_program_and_more_context_is_better(model):
    before = windows_module._scores._cache_size()
    found = {stride: perplexity(model, TEXT, window=48, stride=stride, batch_size=3) for stride in (48, 16)}
    assert windows_module._scores._cache_size() <= before + 1
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(TEXT, add_bos=False)]
    nats, done = 0.0, 0
    for end in (48, *range(64, len(ids) - 1, 16), len(ids) - 1):
        row = ids[max(0, end - 48) : end + 1]
        nats -= by_hand(model, row, len(row) - (end - done)).sum()
        done = end
    assert found[16].loss == pytest.approx(nats / (len(ids) - 1), abs=1e-4)
    assert found[16].loss < found[48].loss and found[16].tokens == found[48].tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1000}, "window is 1000; the model's context has 512 positions"),
        ({"window": 16, "stride": 17}, "stride is 17 and window 16: tokens between two windows would be"),
        ({"stride": 0}, "stride is 0; it must be a whole number, at least 1"),
    ],
)
def test_settings_out_of_range(model, settings, message):
    with pytest.raises(InputError, match=message):
        perplexity(model, TEXT, **settings)


def test_a_text_without_a_token(model):
    with pytest.raises(InputError, match="no token to score"):
        perplexity(model, "")
