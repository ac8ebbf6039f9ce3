"""Speculative decoding gives the same tokens, or the same distribution, in fewer forward passes."""

from __future__ import annotations

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import llama_jax as lj
from llama_jax import meshes
from llama_jax.decoding import arguments, drafts, logits_processors, sampling, speculative
from llama_jax.decoding.drafts import DraftModel, PromptLookup
from llama_jax.decoding.logits_processors import TokenHistory
from llama_jax.decoding.speculative import speculative_generate
from llama_jax.errors import InputError
from tests.decoding.compiled import counting_compiles, loop_body
from tests.optimized import optimized
from tests.random_models import random_model

ROWS, NEW, K = 4, 40, 4
KEY = jax.random.key(0)
KEYS = arguments.row_keys(KEY, ROWS)  # everywhere: a single key takes another program
CONFIG = lj.LlamaConfig(
    vocab_size=12,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=20 + NEW,  # the longest prompt and its continuation fill it
)
GREEDY = lj.Sampling(temperature=0.0)
# A greedy row, a random one, and two with logits processors.
MIXED = lj.Sampling(
    temperature=np.array([0.0, 0.5, 0.0, 0.5]),
    top_k=np.array([0, 5, 0, 0]),
    top_p=np.array([1.0, 0.9, 1.0, 0.95]),
    repetition_penalty=np.array([1.0, 1.0, 1.3, 1.05]),
    presence_penalty=np.array([0.0, 0.0, 0.0, 0.3]),
    no_repeat_ngram_size=np.array([0, 0, 6, 0]),
    min_new_tokens=np.array([0, 0, 20, 12]),
    forced_tokens=np.array([[-1, -1], [-1, -1], [2, 3], [-1, 1]]),
)


def prompts(seed):
    """Prompts of 1 to 20 tokens that repeat themselves."""
    rng = np.random.default_rng(seed)
    rows = [np.resize(rng.integers(0, CONFIG.vocab_size, period), 20) for period in (3, 4, 7, 1)]
    return np.stack(rows), np.array([20, 9, 14, 1])


def params_of(seed, config=CONFIG):
    return random_model(seed, config)[1]


def draft_of(seed, config=CONFIG):
    return DraftModel(config, params_of(seed, config))


def run(seed, settings=GREEDY, draft=None, **more):
    """`generate` with the model and prompts of a seed, or `speculative_generate` where there is a draft."""
    given = CONFIG, params_of(seed), *prompts(seed), KEYS, settings
    more = {"max_new_tokens": NEW} | more
    if draft is None:
        return lj.generate(*given, **more)
    return speculative_generate(*given, draft=draft, **{"num_draft_tokens": K} | more)


def on_mesh(params, mesh):
    """Unstacked and sharded; from numpy, of which parts are cut without compiling programs."""
    return lj.shard_params(lj.unstack(jax.device_get(params)), mesh, CONFIG)


def rows_of(tree, *rows):
    """Of every array some rows; on the host, where that compiles nothing, but for keys."""

    def take(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return (x if is_key else np.asarray(x))[np.array(rows)]

    return jax.tree.map(take, tree)


def same(ours, theirs):
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.lengths, theirs.lengths)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=3e-5)


SOURCES = {"lookup": PromptLookup(), "model": draft_of(10)}
sources = pytest.mark.parametrize("draft", SOURCES.values(), ids=SOURCES)
# The larger program of a draft model only where time does not matter.
lookup_first = pytest.mark.parametrize(
    "draft",
    [SOURCES["lookup"], pytest.param(SOURCES["model"], marks=pytest.mark.slow)],
    ids=list(SOURCES),
)


@pytest.mark.parametrize("settings", [GREEDY, MIXED], ids=["greedy", "mixed"])
def test_prompt_lookup_gives_the_tokens_of_generate(settings):
    accepted = rounds = steps = 0
    for seed in range(6):
        free = run(seed, settings)
        for eos_id in (None, [int(free.tokens[0, 17]), int(free.tokens[1, 29])]):
            expected = run(seed, settings, eos_id=eos_id)
            got = run(seed, settings, PromptLookup(), eos_id=eos_id)
            same(got.output, expected)
            assert (got.accepted <= got.drafted).all()
            accepted += got.accepted.sum()
            rounds, steps = rounds + got.rounds, steps + expected.lengths.max()
        assert ROWS < expected.lengths.sum() < free.lengths.sum()
    assert accepted > 100 and rounds < steps


def test_greedy_rows_with_a_draft_model_equal_generate_in_a_mixed_batch():
    accepted = 0
    for seed in range(6):
        free = run(seed, MIXED)
        for eos_id in (None, [int(free.tokens[0, 17]), int(free.tokens[1, 29])]):
            expected = run(seed, MIXED, eos_id=eos_id)
            got = run(seed, MIXED, draft_of(seed + 10), eos_id=eos_id)
            same(rows_of(got.output, 0, 2), rows_of(expected, 0, 2))
            accepted += rows_of(got.accepted, 0, 2).sum()
    assert accepted > 20


def test_a_model_accepts_all_of_its_own_drafts_and_stops_at_eos():
    for seed in range(6):
        got = run(seed, MIXED, draft_of(seed))
        assert got.rounds == NEW // (K + 1)
        assert got.accepted.tolist() == got.drafted.tolist() == [NEW // (K + 1) * K] * ROWS
        ends = [int(got.output.tokens[0, 17]), int(got.output.tokens[2, 30])]
        same(run(seed, GREEDY, draft_of(seed), eos_id=ends).output, run(seed, eos_id=ends))


@lookup_first
def test_a_row_in_a_batch_is_the_row_alone_and_each_round_adds_one_token_to_those_accepted(draft):
    together = jax.device_get(run(2, MIXED, draft))
    for row in range(ROWS):
        rows = [row] * ROWS  # among copies of itself, with the batch's program; alone it is on a mesh below
        alone = speculative_generate(
            CONFIG, params_of(2), *rows_of((*prompts(2), KEYS, MIXED.broadcast(ROWS)), *rows),
            draft=draft, num_draft_tokens=K, max_new_tokens=NEW,
        )  # fmt: skip
        expected = rows_of((together.output, together.drafted, together.accepted), *rows)
        same(alone.output, expected[0])
        np.testing.assert_array_equal(alone.drafted, expected[1])
        np.testing.assert_array_equal(alone.accepted, expected[2])
        assert alone.rounds + alone.accepted[0] == NEW


# The exact distribution of the first three tokens.

SMALL = CONFIG.replace(vocab_size=5, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
PROMPT = [1, 3, 3, 0]
FILTERED = lj.Sampling(
    temperature=0.8, top_k=4, top_p=0.97, min_p=0.02, repetition_penalty=1.2, frequency_penalty=0.2,
    no_repeat_ngram_size=3, min_new_tokens=2,
)  # fmt: skip


@jax.jit
def following(params, tokens, length, settings, eos_ids):
    """The distribution of the next token after the first `length` of tokens [B, T]."""
    rows = settings.broadcast(len(tokens))
    lengths = jnp.full(len(tokens), length)
    text = TokenHistory(tokens, lengths, jnp.full(len(tokens), len(PROMPT)))
    logits = lj.forward(SMALL, params, tokens)[:, length - 1]
    logits = logits_processors.apply(logits, rows.processors(), text, eos_ids)
    return jax.nn.softmax(sampling.transform(logits, rows))


def joint(params, settings, eos_id):
    """Every continuation by up to three tokens, ended by `eos_id` or not: {text: probability}."""
    eos_ids = arguments.pad_eos_ids(eos_id)
    found = {(): 1.0}
    for count in range(3):
        texts = [text for text in found if len(text) == count and (not text or text[-1] != eos_id)]
        length = len(PROMPT) + count
        tokens = np.zeros((SMALL.vocab_size**2, len(PROMPT) + 2), np.int32)
        tokens[: len(texts), :length] = [[*PROMPT, *text] for text in texts]
        shares = np.asarray(following(params, tokens, length, settings.broadcast(1), eos_ids), np.float64)
        for text, row in zip(texts, shares, strict=False):
            share = found.pop(text)
            found |= {(*text, token): share * p for token, p in enumerate(row)}
    return found


def deviation(counts, expected):
    """Chi-square of {text: count}, rare texts pooled, in standard deviations from its mean."""
    total = sum(counts.values())
    assert not [text for text in counts if expected.get(text, 0) <= 0], "an impossible text"
    common = [text for text, p in expected.items() if p * total >= 8]
    cells = [(counts.get(text, 0), expected[text] * total) for text in common]
    rest = total - sum(n for n, _ in cells), total - sum(p for _, p in cells)
    cells += [rest] if rest[1] >= 8 else []
    freedom = len(cells) - 1
    return (sum((n - p) ** 2 / p for n, p in cells) - freedom) / math.sqrt(2 * freedom)


SAMPLES = 5000


@jax.jit
def sample(params, smaller, settings, eos_id):
    """Three tokens after PROMPT, many times."""
    tokens = jnp.tile(jnp.array(PROMPT), (SAMPLES, 1)), jnp.full(SAMPLES, len(PROMPT))
    return speculative_generate(
        SMALL, params, *tokens, KEY, settings,
        draft=DraftModel(SMALL, smaller), num_draft_tokens=3, max_new_tokens=3, eos_id=eos_id,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "eos_id"), [(lj.Sampling(), -1), (FILTERED, 2)], ids=["plain", "processors"]
)
def test_a_draft_model_preserves_the_distribution(settings, eos_id):
    """Chi-square of many rows' first three tokens with the product of `forward`'s distributions."""
    # Flatter logits, so that every text occurs and both acceptance and rejection are common.
    flat = lambda p: {**p, "final_norm": {"scale": np.float32(0.4) * p["final_norm"]["scale"]}}  # noqa: E731
    params, smaller = flat(params_of(3, SMALL)), flat(params_of(13, SMALL))
    out = sample(params, smaller, settings.broadcast(SAMPLES), eos_id)
    counts = collections.Counter(
        tuple(row[:length])
        for row, length in zip(out.output.tokens.tolist(), out.output.lengths.tolist(), strict=True)
    )
    assert len(counts) > 30 and abs(deviation(counts, joint(params, settings, eos_id))) < 5
    accepted = np.sum(out.accepted) / np.sum(out.drafted)
    assert 0.2 < accepted < 0.9, "both acceptance and rejection must occur"
    if settings is not FILTERED:
        assert deviation(counts, joint(smaller, settings, eos_id)) > 50, "the models are alike"


texts = st.lists(st.integers(0, 3), min_size=1, max_size=14)
looked_up = jax.jit(drafts.prompt_lookup, static_argnums=(1, 2))


@settings(max_examples=60, deadline=None)
@given(texts, st.sampled_from([(1, 1), (2, 1), (3, 2), (9, 3)]))
def test_prompt_lookup_copies_what_followed_the_latest_longest_match(row, sizes):
    tokens = np.full((1, 16), 3, np.int32)  # tokens after the history must not count
    tokens[0, : len(row)] = row
    text = TokenHistory(tokens, np.array([len(row)]), np.array([1]))
    got = looked_up(text, PromptLookup(*sizes), 5)[0].tolist()
    expected = [-1] * 5
    for n in range(min(sizes[0], len(row)), sizes[1] - 1, -1):
        ends = [e for e in range(n, len(row)) if row[e - n : e] == row[len(row) - n :]]
        if ends:
            copy = list(row)
            for i in range(5):
                copy.append(copy[ends[-1] + i])
            expected = copy[len(row) :]
            break
    assert got == expected


@lookup_first
def test_works_inside_jit_vmap_and_shard_map(draft):
    """Each device takes one row; with a draft model under several temperatures, too."""
    # While tracing, the cache has exactly the length that the longest row fills.
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    temperatures = np.array([0.4, 0.7, 1.0], np.float32)
    each = jax.vmap if isinstance(draft, DraftModel) else lambda sample: lambda some: sample(some[0])[None]

    def rows(params, draft, tokens, lengths, keys, temperatures):
        def sample(temperature):
            return speculative_generate(
                CONFIG, params, tokens, lengths, keys, lj.Sampling(temperature=temperature),
                draft=draft, num_draft_tokens=K, max_new_tokens=NEW,
            ).output.tokens  # fmt: skip

        return each(sample)(temperatures)

    lay = (P(), P(), P("rows"), P("rows"), P("rows"), P())
    split = jax.jit(jax.shard_map(rows, mesh=mesh, in_specs=lay, out_specs=P(None, "rows")))
    out = np.asarray(split(params_of(0), draft, *prompts(0), KEYS, temperatures))
    for temperature, tokens in zip(temperatures, out, strict=isinstance(draft, DraftModel)):
        expected = run(0, lj.Sampling(temperature=temperature), draft)
        np.testing.assert_array_equal(tokens, expected.output.tokens)


@pytest.mark.parametrize(
    ("spec", "rows", "draft"),
    [
        pytest.param("data=2,context=2,tensor=2", ROWS, "model", marks=pytest.mark.slow),
        pytest.param("fsdp=4,tensor=2", 1, "lookup", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_gives_the_same_tokens(spec, rows, draft):
    """Of rows that divide over the mesh, whose keys a single one stands for, and of one that does not."""
    draft, chosen = SOURCES[draft], range(ROWS)[-rows:]
    expected = jax.device_get(run(1, MIXED, draft))
    *prompt, keys, settings = rows_of((*prompts(1), KEYS, MIXED.broadcast(ROWS)), *chosen)
    given = *prompt, KEY if rows == ROWS else keys, settings
    mesh = meshes.make_mesh(spec)
    with jax.set_mesh(mesh):
        if isinstance(draft, DraftModel):
            draft = DraftModel(CONFIG, on_mesh(draft.params, mesh))
        params = on_mesh(params_of(1), mesh)
        out = speculative_generate(
            CONFIG, params, *given, draft=draft, num_draft_tokens=K, max_new_tokens=NEW
        )
    same(out.output, rows_of(expected.output, *chosen))
    np.testing.assert_array_equal(out.accepted, expected.accepted[list(chosen)])


@pytest.mark.slow
def test_an_int8_cache():
    got = run(0, GREEDY, draft_of(0), cache_dtype="int8")
    np.testing.assert_array_equal(got.output.tokens, run(0, cache_dtype="int8").tokens)
    assert got.accepted.sum() > 0


@sources
def test_no_setting_and_no_length_within_a_bucket_recompiles(draft):
    weights, (tokens, lengths) = lj.unstack(params_of(0)), prompts(0)
    if isinstance(draft, DraftModel):
        draft = DraftModel(CONFIG, lj.unstack(draft.params))
    go = functools.partial(speculative_generate, CONFIG, weights, draft=draft, num_draft_tokens=K)
    go(tokens, lengths, KEYS, GREEDY, max_new_tokens=3)
    with counting_compiles() as compiled:
        for n, settings in enumerate((GREEDY, MIXED, lj.Sampling(top_p=0.5), FILTERED)):
            short = np.minimum(lengths, 5 + n)
            go(tokens[:, : 5 + n], short, KEYS, settings, max_new_tokens=4 + n, eos_id=[n, n + 1])
    assert not compiled


@sources
def test_the_compiled_rounds_never_copy_a_cache_or_a_weight(draft):
    request = arguments.prepare_request(CONFIG, *prompts(0), GREEDY, None, NEW)
    weights = lj.unstack(params_of(0))
    if isinstance(draft, DraftModel):
        draft = DraftModel(CONFIG, lj.unstack(draft.params))
    lowered = speculative._speculative_loop.lower(
        CONFIG, weights, draft, request.tokens, request.lengths, np.int32(19), KEYS, request.sampling,
        request.eos_ids, np.int32(NEW), num_draft_tokens=K, new_tokens=128, cache_dtype=None,
    )  # fmt: skip
    body = loop_body(optimized(lowered).as_text())
    cache = ROWS, CONFIG.num_key_value_heads, 128 + K, CONFIG.head_dim
    assert "f32[" + ",".join(map(str, cache)) + "]" in body and "dot" in body
    large = {math.prod(cache)} | {leaf.size for leaf in jax.tree.leaves(weights) if leaf.ndim > 1}
    moved = re.findall(r"= (f32\[[\d,]+\])\S* (?:copy|transpose|convert)\(", body)
    sizes = {shape: math.prod(map(int, shape[4:-1].split(","))) for shape in moved}
    assert not [shape for shape, size in sizes.items() if size in large]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0; it must be a whole number, at least 1"),
        ({"num_draft_tokens": 10**9}, "num_draft_tokens is 1000000000; the model's context has 60 positions"),
        ({"draft": PromptLookup(max_ngram=0)}, "max_ngram is 0; it must be a whole number, at least 1"),
        ({"draft": PromptLookup(min_ngram=0)}, "min_ngram is 0; it must be a whole number, at least 1"),
        ({"draft": PromptLookup(1, 2)}, "max_ngram is 1 and min_ngram 2; the first must not be smaller"),
        ({"draft": "lookup"}, "draft is a str; it must be a PromptLookup or a DraftModel"),
        ({"draft": 3}, "draft is a int"),
        (
            {"draft": draft_of(0, SMALL)},
            "the draft model has a vocabulary of 5 and the model one of 12; they must be the same",
        ),
        (
            {"draft": DraftModel(CONFIG.replace(max_position_embeddings=23), params_of(0))},
            "the prompt's 20 tokens and max_new_tokens 4 need 24 positions; the draft model's context has 23",
        ),
        ({"max_new_tokens": 41}, "need 61 positions; the model's context has 60"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"cache_dtype": "int4"}, "cache_dtype is 'int4'"),
        ({"sampling": lj.Sampling(temperature=-1.0)}, "temperature is -1.0"),
    ],
)
def test_invalid_arguments_are_refused(given, message):
    with pytest.raises(InputError) as error:
        speculative_generate(CONFIG, params_of(0), *prompts(0), KEY, **{"max_new_tokens": 4} | given)
    assert message in str(error.value) and "\n" not in str(error.value)
