"""Beam search: parity with Hugging Face by golden file, and invariants of any beam search.

SmolLM2's beams are compared in tests/parity: to compile its 30 layers takes as long as half of this file.
"""

from __future__ import annotations

import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import llama_jax as lj
from llama_jax import meshes
from llama_jax.decoding import arguments
from llama_jax.decoding import beam_search as module
from llama_jax.decoding.beam_search import beam_search
from llama_jax.errors import InputError
from tests.decoding.compiled import counting_compiles, loop_body
from tests.golden import beams
from tests.optimized import optimized
from tests.random_models import SMALL, random_model, random_prompts
from tests.uncached import logprobs_by_forward, pick

KEY = jax.random.key(0)
CONFIG, STACKED = random_model(0, SMALL)
PARAMS = lj.unstack(STACKED)
# One shape and at most 8 end tokens for most tests, so that they share a compiled program.
PROMPTS, LENGTHS = random_prompts(0, CONFIG, [3, 17, 1, 9])
PROCESSORS = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": (5, 6)}
END = [7, 30]
ENDS = [10, 12, 17, 42, 43, 44, 46, 59]  # frequent in its continuations


@pytest.fixture(scope="module")
def golden():
    with np.load(beams.BEAMS) as file:
        return {name: x if x.dtype == np.float32 else x.astype(np.int32) for name, x in file.items()}


@pytest.mark.parametrize("number", beams.MODELS)
def test_equals_hugging_face(golden, number):
    config, params, tokens = beams.small_model(number)
    ends, common = (tuple(golden[f"{name}_{number}"].tolist()) for name in ("ends", "common"))
    for index, setting in enumerate(beams.settings(number, ends, common)):
        out = beams.run(config, params, tokens, beams.PROMPT_LENGTHS, setting, beams.NEW_TOKENS)
        np.testing.assert_array_equal(out.tokens, golden[f"tokens_{number}"][index])
        np.testing.assert_array_equal(out.lengths, golden[f"lengths_{number}"][index])
        np.testing.assert_allclose(out.scores, golden[f"scores_{number}"][index], rtol=beams.TOLERANCE)


def test_the_golden_file_distinguishes_the_settings(golden):
    """Checks the golden file itself: settings without an effect would test nothing."""
    pairs = dict.fromkeys(itertools.combinations(range(7), 2), 0)
    for number in beams.MODELS:
        found = golden[f"tokens_{number}"]
        for a, b in pairs:
            pairs[a, b] += not np.array_equal(found[a], found[b])
    assert min(pairs.values()) >= 5
    penalties = {beams.settings(number, (), ())[3].length_penalty for number in beams.MODELS}
    assert penalties == {-0.5, 0.0, 1.0, 2.0}
    assert {beams.num_beams(number) for number in beams.MODELS} == {2, 3, 4, 5}


def search(tokens=PROMPTS, lengths=LENGTHS, beams=4, *, params=PARAMS, **settings):
    return beam_search(CONFIG, params, tokens, lengths, beams, **{"max_new_tokens": 20, **settings})


def found(*args, **settings):
    """`search`'s result as numpy arrays, of which slices compile nothing."""
    return jax.device_get(search(*args, **settings))


@pytest.mark.parametrize("stop", [False, True, "never"])
@pytest.mark.parametrize("sampling", [{}, PROCESSORS], ids=["plain", "processors"])
def test_one_beam_is_greedy_decoding(sampling, stop):
    greedy = lj.Sampling(temperature=0.0, **sampling)
    generate = functools.partial(
        lj.generate, CONFIG, PARAMS, PROMPTS, LENGTHS, KEY, greedy, max_new_tokens=20
    )
    free = generate().tokens
    ends = [int(free[0, 3]), int(free[1, 9])]
    expected = generate(eos_id=ends)
    out = search(beams=1, eos_id=ends, early_stopping=stop, sampling=lj.Sampling(**sampling))
    np.testing.assert_array_equal(out.tokens[:, 0], expected.tokens)
    np.testing.assert_array_equal(out.lengths[:, 0], expected.lengths)
    np.testing.assert_allclose(out.logprobs[:, 0], expected.logprobs, atol=1e-5)
    assert len(set(expected.lengths.tolist())) > 1


def test_a_row_in_a_ragged_batch_is_the_row_alone():
    settings = {"eos_id": END, "num_return_sequences": 3, "sampling": lj.Sampling(**PROCESSORS)}
    together = found(length_penalty=np.arange(4.0), **settings)
    for row in range(4):
        prompt, length = PROMPTS[row : row + 1, : LENGTHS[row]], LENGTHS[row : row + 1]
        alone = found(prompt, length, length_penalty=row, **settings)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_array_equal(alone.lengths[0], together.lengths[row])
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=1e-5)


def test_padding_does_not_matter():
    more = np.concatenate([PROMPTS, np.full((4, 30), -5, np.int32)], axis=1)
    unpadded, padded = search(), search(more)
    np.testing.assert_array_equal(padded.tokens, unpadded.tokens)
    np.testing.assert_allclose(padded.scores, unpadded.scores, rtol=1e-5)


def test_scores_are_those_of_forward():
    for penalty in (1.0, 0.0, -1.5, np.array([2.0, 0.3, 1.0, 0.0])):
        out = found(eos_id=END, length_penalty=penalty, num_return_sequences=4)
        assert (np.diff(out.scores, axis=1) <= 0).all()
        tokens, lengths = out.tokens.reshape(16, 20), out.lengths.reshape(16, 1)
        logprobs = logprobs_by_forward(CONFIG, STACKED, PROMPTS.repeat(4, 0), LENGTHS.repeat(4), tokens)
        picked = np.where(np.arange(20) < lengths, pick(logprobs, tokens), 0)
        np.testing.assert_allclose(out.logprobs.reshape(16, 20), picked, atol=5e-5)
        scores = picked.sum(-1) / lengths[:, 0] ** np.broadcast_to(penalty, 4).repeat(4)
        np.testing.assert_allclose(out.scores.reshape(16), scores, rtol=1e-5)


def test_sequences_are_distinct_and_only_their_last_token_is_eos():
    out = found(eos_id=ENDS, num_return_sequences=4)
    early = 0
    for row in range(4):
        texts = [out.tokens[row, i, : out.lengths[row, i]].tolist() for i in range(4)]
        assert len(set(map(tuple, texts))) == 4
        for i, text in enumerate(texts):
            assert text[-1] in ENDS or len(text) == 20
            assert not set(text[:-1]) & set(ENDS)
            assert not out.tokens[row, i, len(text) :].any() and not out.logprobs[row, i, len(text) :].any()
            early += len(text) < 20
    assert early > 4


@pytest.mark.parametrize("penalty", [1.0, 0.0, -0.7])
@pytest.mark.parametrize("ends", [None, 2, [2, 2, 4]], ids=str)
def test_v_beams_find_the_best_of_all_sequences_of_two_tokens(ends, penalty):
    vocabulary = 7
    config, params = random_model(11, CONFIG.replace(vocab_size=vocabulary))
    tokens, lengths = random_prompts(3, config, [4])
    out = beam_search(
        config, lj.unstack(params), tokens, lengths, vocabulary,
        max_new_tokens=2, eos_id=ends, length_penalty=penalty,
        early_stopping="never", num_return_sequences=vocabulary,
    )  # fmt: skip
    pairs = np.stack([np.arange(vocabulary), np.zeros(vocabulary, int)], axis=1)  # whatever the second
    repeated = tokens.repeat(vocabulary, 0), lengths.repeat(vocabulary)
    logprobs = logprobs_by_forward(config, params, *repeated, pairs)
    texts = []
    for a in range(vocabulary):
        first, second = logprobs[a, 0, a], logprobs[a, 1]
        if a in np.atleast_1d([] if ends is None else ends):
            texts.append((first, [a, 0]))
        else:
            texts += [((first + second[b]) / 2**penalty, [a, b]) for b in range(vocabulary)]
    texts.sort(reverse=True)
    out = jax.device_get(out)
    assert out.tokens[0].tolist() == [text for _, text in texts[:vocabulary]]
    np.testing.assert_allclose(out.scores[0], [score for score, _ in texts[:vocabulary]], rtol=1e-5)


@pytest.mark.parametrize("penalty", [2.0, 1.0, 0.0, -1.0])
def test_later_stopping_never_lowers_a_score(penalty):
    settings = {"eos_id": ENDS, "length_penalty": penalty, "num_return_sequences": 4}
    once, now, never = (found(early_stopping=stop, **settings).scores for stop in (True, False, "never"))
    assert (once <= now).all() and (now <= never).all()
    if penalty > 0:
        assert (once < now).any() and (now < never).any()
    else:
        np.testing.assert_array_equal(now, never)


def test_logits_processors_apply_to_every_sequence():
    suppressed = np.unique(found(num_return_sequences=4).tokens)[:8].tolist()
    sampling = lj.Sampling(
        no_repeat_ngram_size=2, min_new_tokens=6, suppress_tokens=suppressed, forced_tokens=[60, -1, 61]
    )
    assert not {60, 61} & set(suppressed)
    out = found(eos_id=ENDS, num_return_sequences=4, sampling=sampling)
    for row, i in itertools.product(range(4), range(4)):
        text = out.tokens[row, i, : out.lengths[row, i]].tolist()
        assert len(text) >= 6 and text[0] == 60 and text[2] == 61
        assert not set(suppressed) & set(text)
        pairs = list(itertools.pairwise(PROMPTS[row, : LENGTHS[row]].tolist() + text))
        new = range(LENGTHS[row] - 1, len(pairs))
        # The second token is forced, whatever pair it makes.
        assert not [at for at in new if pairs[at] in pairs[:at] and at - LENGTHS[row] + 1 not in (0, 2)]


def test_missing_sequences_are_empty():
    forced = lj.Sampling(forced_tokens=[8, 9])
    out = search(max_new_tokens=2, num_return_sequences=3, length_penalty=300.0, sampling=forced)
    for row in range(4):
        assert out.tokens[row].tolist() == [[8, 9], [0, 0], [0, 0]]
        assert out.lengths[row].tolist() == [2, 0, 0]
        assert out.scores[row].tolist() == [0, -math.inf, -math.inf]


def test_works_inside_jit_vmap_and_shard_map():
    """Each device takes one row, under every length penalty."""
    penalties = np.array([0.0, 1.0, 3.0], np.float32)
    settings = {"eos_id": END, "num_return_sequences": 2, "early_stopping": "never"}
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])

    def rows(params, tokens, lengths, penalties):
        one = lambda penalty: search(tokens, lengths, params=params, length_penalty=penalty, **settings)  # noqa: E731
        return jax.vmap(one)(penalties)

    lay = (P(), P("rows"), P("rows"), P())
    split = jax.jit(jax.shard_map(rows, mesh=mesh, in_specs=lay, out_specs=P(None, "rows")))
    out = split(STACKED, PROMPTS, LENGTHS, penalties)
    assert out.tokens.shape == (3, 4, 2, 20)
    out = jax.device_get(out)
    for i, penalty in enumerate(penalties):
        alone = found(length_penalty=penalty, **settings)
        np.testing.assert_array_equal(out.tokens[i], alone.tokens)
        np.testing.assert_allclose(out.scores[i], alone.scores, rtol=1e-5)


def test_a_mesh_gives_the_same_sequences():
    settings = {"eos_id": END, "num_return_sequences": 4, "sampling": lj.Sampling(**PROCESSORS)}
    expected = found(**settings)
    mesh = meshes.make_mesh("fsdp=2,context=2,tensor=2")
    with jax.set_mesh(mesh):
        params = lj.shard_params(jax.device_get(PARAMS), mesh, CONFIG)
        out = search(params=params, **settings)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_allclose(out.scores, expected.scores, rtol=1e-5)


def test_works_with_64_bit_types_enabled():
    expected = search(eos_id=END)
    with jax.enable_x64(True):
        out = search(eos_id=END)
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(lambda x: x.dtype, expected)


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_a_cache_of_8_bits_changes_little(dtype):
    exact, rounded = search(), search(cache_dtype=dtype)
    np.testing.assert_allclose(rounded.scores, exact.scores, rtol=0.05 if dtype == "int8" else 0.1)
    assert np.any(rounded.scores != exact.scores)


def test_no_setting_and_no_length_within_a_bucket_recompiles():
    forms = [
        {"length_penalty": 0},
        {"length_penalty": np.float64(1.5), "early_stopping": True},
        {"early_stopping": "never", "eos_id": [3, 4]},
        {"eos_id": 7, "sampling": lj.Sampling(temperature=0, repetition_penalty=1.3)},
        {"num_return_sequences": 3, "length_penalty": np.array([0.5])},
        {"sampling": lj.Sampling(no_repeat_ngram_size=2, suppress_tokens=[1, 2])},
    ]
    search(np.ones((1, 7), int), np.array([7]))
    with counting_compiles() as compiled:
        for n in range(12):
            tokens, lengths = random_prompts(n, CONFIG, [n + 1])
            search(tokens, lengths, max_new_tokens=1 + n, **forms[n % len(forms)])
    assert not compiled


def test_the_compiled_loop_never_copies_or_reorders_the_cache():
    request = arguments.prepare_request(CONFIG, PROMPTS, LENGTHS, None, None, 20)
    fixed = module._Arguments(
        lengths=request.lengths,
        max_prompt_length=np.int32(17),
        limit=np.int32(20),
        eos_ids=request.eos_ids,
        length_penalty=np.ones(4, np.float32),
        early_stopping=np.int32(0),
        sampling=request.sampling,
    )
    lowered = module._beam_search.lower(CONFIG, PARAMS, request.tokens, fixed, 4, 128, None)
    body = loop_body(optimized(lowered).as_text())
    cache = (4, CONFIG.num_key_value_heads, 128, CONFIG.head_dim)
    assert "f32[" + ",".join(map(str, cache)) + "]" in body and "dot" in body
    large = {math.prod(cache)} | {leaf.size for leaf in jax.tree.leaves(PARAMS) if leaf.ndim > 1}
    moves = "copy|transpose|convert|gather|concatenate|slice|dynamic-slice"
    moved = re.findall(rf"= \w+\[([\d,]+)\]\S* (?:{moves})\(", body)
    sizes = {shape: math.prod(map(int, shape.split(","))) for shape in moved}
    assert f"4,4,{cache[2]}" in sizes  # the mask is reordered
    assert not [shape for shape, size in sizes.items() if size in large]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0; it must be a whole number, at least 1"),
        ({"num_beams": 2.0}, "num_beams is 2.0; it must be a whole number"),
        ({"num_beams": 73}, "num_beams is 73; the vocabulary has only 72 tokens"),
        ({"num_return_sequences": 4}, "num_return_sequences is 4; it must be at most num_beams, which is 3"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"length_penalty": math.nan}, "length_penalty is nan; it must be a finite number"),
        ({"length_penalty": "1"}, "length_penalty is '1'; it must be a finite number"),
        ({"length_penalty": [1.0, 2.0, 3.0]}, "length_penalty has shape (3,); it must be a scalar or"),
        ({"early_stopping": "always"}, "early_stopping is 'always'; it must be True, False or \"never\""),
        ({"early_stopping": None}, "early_stopping is None"),
        ({"early_stopping": 1}, "early_stopping is 1"),
        ({"sampling": lj.Sampling(temperature=0.7)}, "temperature is 0.7, but beam search does not sample"),
        ({"sampling": lj.Sampling(top_k=[0, 5])}, "top_k is 5, but beam search does not sample"),
        ({"sampling": lj.Sampling(top_p=0.9)}, "top_p is 0.9, but"),
        ({"sampling": lj.Sampling(min_p=0.1)}, "min_p is 0.1, but"),
        ({"sampling": lj.Sampling(temperature=-1)}, "temperature is -1"),
        ({"sampling": lj.Sampling(repetition_penalty=0)}, "repetition_penalty is 0"),
        ({"cache_dtype": "int4"}, "cache_dtype is 'int4'"),
        ({"eos_id": 2.5}, "eos_id is 2.5"),
        ({"lengths": [0, 3]}, "lengths is 0 in row 0: an empty prompt"),
        ({"tokens": [[1, 2, 3, 4], [1, 72, 3, 4]]}, "token id 72 in row 1, position 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 510}, "max_new_tokens 510 need 513 positions; the model's context has 512"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused(given, message):
    prompts = {"tokens": [[1, 2, 3, 4], [5, 6, 7, 8]], "lengths": [3, 3]}
    settings = {**prompts, "num_beams": 3, "max_new_tokens": 4, **given}
    tokens, lengths = (np.array(settings.pop(name)) for name in prompts)
    with pytest.raises(InputError) as error:
        beam_search(CONFIG, PARAMS, tokens, lengths, **settings)
    assert message in str(error.value) and "\n" not in str(error.value)
