"""Logits processors: each against its definition in plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import llama_jax as lj
from llama_jax.decoding import logits_processors
from llama_jax.decoding.logits_processors import TokenHistory
from llama_jax.decoding.sampling import Sampling
from tests.random_models import SMALL, random_model, random_prompts

V = 7
KEY = jax.random.key(0)
fast = settings(max_examples=80, deadline=None)
texts = st.lists(st.integers(0, V - 1), min_size=1, max_size=12)
logits_row = st.lists(st.floats(-8, 8, width=32, allow_subnormal=False), min_size=V, max_size=V).map(
    lambda row: np.array([row], np.float32)
)


def text_of(row, prompt=0, room=16):
    tokens = np.full((1, room), V - 1, np.int32)  # tokens after the history must not count
    tokens[0, : len(row)] = row
    return TokenHistory(jnp.asarray(tokens), jnp.array([len(row)]), jnp.array([prompt]))


apply = jax.jit(
    lambda logits, s, text, eos: logits_processors.apply(logits, s.broadcast(1).processors(), text, eos)
)
NO_EOS = jnp.full(8, -1)


def process(logits, text, eos=NO_EOS, **settings):
    return np.asarray(apply(logits, Sampling(**settings), text, eos))


@fast
@given(logits_row, texts)
def test_processors_that_are_off_change_nothing(logits, row):
    np.testing.assert_array_equal(process(logits, text_of(row)), logits)


@fast
@given(logits_row, texts, st.floats(0.5, 3, width=32))
def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens(logits, row, x):
    got = process(logits, text_of(row), repetition_penalty=x)
    for token, logit in enumerate(logits[0]):
        expected = (logit / np.float32(x) if logit > 0 else logit * np.float32(x)) if token in row else logit
        np.testing.assert_allclose(got[0, token], expected, rtol=1e-6, atol=1e-30)  # XLA flushes subnormals


@fast
@given(logits_row, texts, st.integers(0, 12), st.floats(-2, 2, width=32), st.floats(-2, 2, width=32))
def test_presence_and_frequency_penalties_count_generated_tokens(logits, row, prompt, presence, frequency):
    prompt = min(prompt, len(row))
    got = process(logits, text_of(row, prompt), presence_penalty=presence, frequency_penalty=frequency)
    for token, logit in enumerate(logits[0]):
        count = row[prompt:].count(token)
        np.testing.assert_allclose(
            got[0, token], logit - presence * (count > 0) - frequency * count, atol=1e-5
        )


@fast
@given(logits_row, texts, st.integers(1, 5))
def test_no_ngram_is_repeated(logits, row, size):
    got = process(logits, text_of(row), no_repeat_ngram_size=size)
    there = {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}
    start = tuple(row[len(row) - size + 1 :]) if size > 1 else ()
    banned = {token for token in range(V) if len(row) >= size and (*start, token) in there}
    banned = banned if len(banned) < V else set()  # a row always keeps a token
    assert {int(token) for token in np.flatnonzero(np.isinf(got[0]))} == banned


@fast
@given(logits_row, texts, st.integers(0, 12), st.integers(0, 12))
def test_no_eos_before_min_new_tokens_and_no_suppressed_token(logits, row, prompt, least):
    prompt = min(prompt, len(row))
    got = process(
        logits, text_of(row, prompt), jnp.array([2, 4, -1]), min_new_tokens=least, suppress_tokens=[0]
    )
    early = {2, 4} if len(row) - prompt < least else set()
    assert {int(token) for token in np.flatnonzero(np.isinf(got[0]))} == {0} | early


@fast
@given(logits_row, st.integers(0, 4))
def test_forced_tokens_mask_all_others_and_free_positions_none(logits, count):
    got = process(logits, text_of([1] * (3 + count), 3), forced_tokens=[5, -1, 2])
    if count in (0, 2):
        assert np.flatnonzero(np.isfinite(got[0])).tolist() == [5 if count == 0 else 2]
    else:
        np.testing.assert_array_equal(got, logits)


@fast
@given(logits_row, texts, st.integers(1, 4))
def test_bans_are_idempotent(logits, row, size):
    bans = {"no_repeat_ngram_size": size, "suppress_tokens": [1, 3]}
    once = process(logits, text_of(row), **bans)
    np.testing.assert_array_equal(process(once, text_of(row), **bans), once)


ROWS = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20},
    {"temperature": 0.0, "repetition_penalty": 1.7, "presence_penalty": 1.0},
    {"temperature": 1.2, "top_p": 0.8, "frequency_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"temperature": 0.0, "no_repeat_ngram_size": 1, "min_new_tokens": 6},
    {"temperature": 0.0, "min_new_tokens": 3, "suppress_tokens": [4, 9], "forced_tokens": [3, -1, 7]},
)


def test_rows_of_a_mixed_batch_equal_each_row_alone():
    """Greedy, random, penalized, suppressed and forced rows in one batch do not affect each other."""
    config, params = random_model(4, SMALL)
    tokens, lengths = random_prompts(4, config, [5, 9, 3, 7, 1, 6])
    keys = jax.random.split(KEY, len(ROWS))
    off = {name: getattr(Sampling(), name) for name in set().union(*ROWS)}
    together = {}
    for name in off:
        column = [row.get(name, off[name]) for row in ROWS]
        if name in ("suppress_tokens", "forced_tokens"):
            column = [list(ids) + [-1] * (3 - len(ids)) for ids in column]
        together[name] = np.array(column)
    weights = lj.unstack(jax.device_get(params))
    settings = {"max_new_tokens": 12, "eos_id": [2, 5, 8]}
    out = lj.generate(config, weights, tokens, lengths, keys, Sampling(**together), **settings)
    out = jax.device_get(out)
    for row, alone in enumerate(ROWS):
        prompt = tokens[row : row + 1, : lengths[row]]
        one = lj.generate(
            config,
            weights,
            prompt,
            lengths[row : row + 1],
            keys[row : row + 1],
            Sampling(**alone),
            **settings,
        )
        np.testing.assert_array_equal(out.tokens[row], np.asarray(one.tokens)[0])
    assert out.lengths[4] >= 6
    assert out.tokens[5, 0] == 3 and out.tokens[5, 2] == 7
    fifth = np.asarray(out.tokens[4, : out.lengths[4]]).tolist()
    assert len(set(fifth)) == len(fifth), "an n-gram of one token occurs once"
