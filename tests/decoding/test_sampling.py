"""Sampling transforms: each against its definition, their invariants, and invalid settings."""

from __future__ import annotations

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from llama_jax.decoding import logits_processors, sampling
from llama_jax.decoding.logits_processors import TokenHistory
from llama_jax.decoding.sampling import Sampling, sample, sample_gumbel
from llama_jax.errors import InputError
from tests.optimized import optimized

logits_rows = st.lists(
    st.lists(st.floats(-20, 20, width=32, allow_subnormal=False), min_size=11, max_size=11),
    min_size=3,
    max_size=3,
).map(lambda rows: np.array(rows, np.float32))

top_k, top_p, min_p = (jax.jit(f) for f in (sampling.top_k, sampling.top_p, sampling.min_p))
fast = settings(max_examples=60, deadline=None)


def rows(*values, dtype=jnp.float32):
    return jnp.array(values, dtype)


def kept(logits):
    return np.isfinite(np.asarray(logits))


@fast
@given(logits_rows, st.lists(st.integers(0, 12), min_size=3, max_size=3))
def test_top_k_keeps_the_k_largest_and_their_ties(logits, k):
    got = top_k(logits, rows(*k, dtype=jnp.int32))
    for row, size, out in zip(logits, k, np.asarray(got), strict=True):
        cut = np.sort(row)[-size] if 0 < size <= row.size else -np.inf
        np.testing.assert_array_equal(out, np.where(row >= cut, row, -np.inf))


@fast
@given(logits_rows, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    got = kept(top_p(logits, rows(p, p, p)))
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    for keep, probability in zip(got, probabilities, strict=True):
        assert keep.any(), "one token always stays"
        assert probability[keep].sum() >= p - 1e-5, "the token that crosses p stays"
        least = probability[keep].min()
        assert probability[keep & (probability > least)].sum() < p + 1e-5, "and nothing after it"
        assert probability[~keep].max(initial=0.0) < least


@fast
@given(logits_rows, st.floats(0.001, 1.0))
def test_min_p_keeps_tokens_above_the_fraction(logits, share):
    got = kept(min_p(logits, rows(share, share, share)))
    ratio = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True).astype(np.float64))
    clear = np.abs(ratio / share - 1) > 1e-4  # away from rounding at the edge
    np.testing.assert_array_equal(got[clear], (ratio >= share)[clear])
    assert got.any(-1).all()


@fast
@given(logits_rows, st.integers(1, 11), st.floats(0.05, 0.95), st.floats(0.01, 0.9))
def test_top_k_and_min_p_are_idempotent(logits, k, p, share):
    for apply, value in ((top_k, rows(k, k, k, dtype=jnp.int32)), (min_p, rows(share, share, share))):
        once = apply(logits, value)
        np.testing.assert_array_equal(apply(once, value), once)
    # Top-p renormalizes, so a second pass may cut further, but never what it must keep.
    twice = kept(top_p(top_p(logits, rows(p, p, p)), rows(p, p, p)))
    assert twice.any(-1).all() and not (twice & ~kept(top_p(logits, rows(p, p, p)))).any()


@fast
@given(logits_rows)
def test_settings_that_are_off_change_nothing(logits):
    np.testing.assert_array_equal(jax.jit(sampling.transform)(logits, Sampling().broadcast(3)), logits)


def test_order_is_temperature_k_p_min_p():
    logits = jnp.array([[1.5, 2.9, 1.0, 0.0, -4.0]])
    s = Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.2)
    expected = sampling.top_k(logits / 0.5, rows(3, dtype=jnp.int32))
    expected = sampling.min_p(sampling.top_p(expected, rows(0.9)), rows(0.2))
    np.testing.assert_array_equal(sampling.transform(logits, s.broadcast(1)), expected)
    assert kept(expected).sum() == 1


def jitted(sampler):
    return jax.jit(lambda logits, s, keys: sampler(logits, s.broadcast(logits.shape[0]), keys))


sample_jit, sample_gumbel_jit = jitted(sample), jitted(sample_gumbel)


BOTH = pytest.mark.parametrize("sampler", [sample, sample_gumbel], ids=["inverse", "gumbel"])


def samples(logits, s, sampler=sample, count=20_000, seed=0):
    """A token for each of `count` keys."""
    keys = jax.random.split(jax.random.key(seed), count)
    one = lambda key: sampler(logits[None], s.broadcast(1), key[None])[0]  # noqa: E731
    return np.asarray(jax.jit(jax.vmap(one))(keys))


def drawn(logits, s, sampler=sample):
    return np.bincount(samples(logits, s, sampler), minlength=logits.size)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    used = expected > 0
    assert counts[~used].sum() == 0, "a token of probability 0 was sampled"
    return ((counts[used] - expected[used]) ** 2 / expected[used]).sum(), used.sum() - 1


@BOTH
@pytest.mark.parametrize("vocab", [7, 256, 700])
def test_samples_follow_the_softmax(vocab, sampler):
    """Chi-square over 20,000 samples; 256 tokens fill one block of the search, 700 take three."""
    logits = jax.random.normal(jax.random.key(vocab), (vocab,)) * 1.5
    counts = drawn(logits, Sampling(temperature=0.8), sampler)
    statistic, freedom = chi_square(counts, np.asarray(jax.nn.softmax(logits / 0.8), np.float64))
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@BOTH
def test_samples_with_filters_follow_the_filtered_softmax(sampler):
    logits = jnp.array([2.0, 1.5, 1.0, 0.0, -1.0, -9.0])
    s = Sampling(temperature=1.3, top_k=4, top_p=0.95, min_p=0.05)
    target = jax.nn.softmax(sampling.transform(logits[None], s.broadcast(1)))[0]
    statistic, freedom = chi_square(drawn(logits, s, sampler), np.asarray(target, np.float64))
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


def test_nearly_equal_logits_give_other_tokens_less_often_by_gumbel_noise():
    """At most 2 d / (1 + d) of them for total variation d (arXiv 2408.07978); inversion has no such bound."""
    logits = jax.random.normal(jax.random.key(0), (700,)) * 1.5
    near = logits + 0.05 * jax.random.normal(jax.random.key(1), (700,))
    settings = Sampling(temperature=0.8)
    distance = float(jnp.abs(jax.nn.softmax(logits / 0.8) - jax.nn.softmax(near / 0.8)).sum() / 2)
    by_noise, by_inversion = (
        (samples(logits, settings, sampler) != samples(near, settings, sampler)).mean()
        for sampler in (sample_gumbel, sample)
    )
    bound, deviation = 2 * distance / (1 + distance), np.sqrt(distance / 20_000)
    assert distance - 4 * deviation < by_noise < bound + 6 * deviation
    assert by_noise < by_inversion / 3


@fast
@given(logits_rows, st.integers(0, 2**31))
def test_top_k_1_and_temperature_0_are_greedy(logits, seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    for s in (Sampling(temperature=0.0), Sampling(top_k=1), Sampling(temperature=7.0, top_k=1)):
        for sampler in (sample_jit, sample_gumbel_jit):
            np.testing.assert_array_equal(sampler(logits, s, keys), logits.argmax(-1))


def test_each_row_has_its_own_settings():
    logits = jnp.tile(jax.random.normal(jax.random.key(0), (1, 40)), (3, 1))
    keys = jax.random.split(jax.random.key(1), 3)
    mixed = Sampling(temperature=rows(0.0, 1.0, 3.0), top_k=rows(0, 5, 0, dtype=jnp.int32))
    together = sample_jit(logits, mixed, keys)
    for row, (t, k) in enumerate([(0.0, 0), (1.0, 5), (3.0, 0)]):
        alone = sample_jit(logits[:1], Sampling(temperature=t, top_k=k), keys[row : row + 1])
        assert together[row] == alone[0]


def vocabulary_passes(jaxpr):
    """Primitives that read or write an array over the vocabulary of 300, outside all conditionals."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            continue
        inner = list(jaxprs_in_params(equation.params))
        for part in inner:
            found += vocabulary_passes(part)
        shapes = [var.aval.shape for var in (*equation.invars, *equation.outvars)]
        if not inner and any(300 in shape for shape in shapes):
            found[equation.primitive.name] += 1
    return found


def conditionals(jaxpr):
    """Every conditional of a program, those within others included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            yield equation
        for part in jaxprs_in_params(equation.params):
            yield from conditionals(part)


def test_a_filter_that_is_off_in_every_row_does_not_read_the_logits():
    """All filters are inside conditionals; outside them a greedy step takes the argmax and nothing else."""
    logits, keys = jnp.zeros((2, 300)), jax.random.split(jax.random.key(0), 2)
    history = TokenHistory(jnp.zeros((2, 40), jnp.int32), jnp.array([9, 9]), jnp.array([3, 3]))

    processors = functools.partial(logits_processors.apply, history=history, eos_ids=jnp.full(8, -1))

    def step(logits, settings, keys):
        return sample(processors(logits, settings.processors()), settings, keys)

    settings = Sampling().broadcast(2)
    program = jax.make_jaxpr(step)(logits, settings, keys).jaxpr
    assert vocabulary_passes(program) == vocabulary_passes(jax.make_jaxpr(sampling.argmax)(logits).jaxpr)
    filters = jax.make_jaxpr(sampling.transform)(logits, settings).jaxpr
    assert vocabulary_passes(filters) == {"div": 1}  # the temperature
    outer, *inner = conditionals(jax.make_jaxpr(processors)(logits, settings.processors()).jaxpr)
    assert len(inner) == 6
    assert not any(vocabulary_passes(branch.jaxpr) for branch in outer.params["branches"])
    compiled = optimized(jax.jit(step).lower(logits, settings, keys)).as_text()
    assert compiled.count(" conditional(") == len(list(conditionals(program))), "XLA keeps every conditional"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5; it must be a finite number, at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1e39}, "temperature is 1e+39; it must be a finite number, at least 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"top_p": np.array([0.5, 1.2])}, "top_p is 1.2 in row 1"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be between -2 and 2 (0 turns it off)"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"min_new_tokens": 1.5}, "min_new_tokens is 1.5"),
        ({"suppress_tokens": [3, 50]}, "suppress_tokens holds 50; ids go from 0 to 49, and -1 is none"),
        ({"suppress_tokens": [1.5]}, "suppress_tokens is float64 of shape (1,); it must be token ids"),
        ({"suppress_tokens": [[1, 2], [3]]}, "suppress_tokens holds rows of different lengths"),
        ({"suppress_tokens": range(50)}, "suppress_tokens holds the whole vocabulary, in row 0"),
        ({"forced_tokens": [[1], [2], [3]]}, "forced_tokens is int64 of shape (3, 1)"),
        (
            {"suppress_tokens": [4, 5], "forced_tokens": [[1, -1], [2, 5]]},
            "token 5 is both in suppress_tokens and in forced_tokens, in row 1",
        ),
        (
            {"top_p": np.array([0.5, 0.5, 0.5])},
            "top_p has shape (3,); it must be a scalar or one value for each of 2 rows",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        Sampling(**settings).check(batch=2, vocab_size=50)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_p": 1e-46},
        {"top_p": 0.0},
        {"min_p": 2.0},
        {"top_k": -1},
        {"temperature": 2e-38},
        {"temperature": 1e-46},
        {"temperature": -1.0, "top_p": 0.5},
    ],
)
def test_no_setting_samples_an_id_outside_the_vocabulary(settings):
    """Invalid values, which pass unchecked only while tracing, and ones that f32 rounds to 0."""
    logits = jax.random.normal(jax.random.key(0), (4, 300)) * 10
    keys = jax.random.split(jax.random.key(1), 4)
    token = sample_jit(logits, Sampling(**settings), keys)
    assert (token < 300).all()
    if settings.get("top_k") is None:
        np.testing.assert_array_equal(token, logits.argmax(-1))


@pytest.mark.parametrize(
    "row", [[1.0, 3.0, 3.0], [-np.inf] * 3, [np.nan, 1.0, 2.0], [1.0, np.nan, np.inf], [np.inf, np.inf, 0.0]]
)
def test_argmax_is_numpys(row):
    assert sampling.argmax(jnp.asarray([row]))[0] == jnp.argmax(jnp.asarray(row))


def test_nan_logits_stay_inside_the_vocabulary():
    keys = jax.random.split(jax.random.key(1), 2)
    token = sample_jit(jnp.full((2, 300), jnp.nan), Sampling(), keys)
    assert ((token >= 0) & (token < 300)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_p": 1e-46}, "top_p is 1e-46; it must be above 0"),
        ({"top_k": 2**40}, "top_k is 1099511627776; it must be below 2^31"),
        ({"temperature": "warm"}, "temperature is 'warm'; it must be a number"),
        ({"top_k": None}, "top_k is None; it must be a number"),
    ],
)
def test_settings_that_f32_or_int32_cannot_represent_are_refused(settings, message):
    with pytest.raises(InputError) as error:
        Sampling(**settings).check(batch=2)
    assert message in str(error.value) and "\n" not in str(error.value)
