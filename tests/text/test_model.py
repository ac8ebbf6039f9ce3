"""`Model.generate`: beam search, multiple sequences, stop strings, drafts, quantized weights and caches."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import InputError
from tests import tiny

CONFIG = tiny.CONFIG.replace(num_hidden_layers=1)
NEW = 8  # this, one or two prompts, and one or two texts of each: few programs
PROMPTS = ["ab", "a b c"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"), CONFIG)


@pytest.fixture(scope="module")
def model(path):
    return lj.load(path, scan_layers=False)


def test_each_text_ends_before_its_first_stop_string(model):
    whole = model.generate(PROMPTS, max_new_tokens=NEW)
    stop = whole[0][2:4]
    assert model.generate(PROMPTS, max_new_tokens=NEW, stop_strings=stop) == [
        text[: text.find(stop)] if stop in text else text for text in whole
    ]
    cut = model.generate(PROMPTS[0], max_new_tokens=NEW, stop_strings=["never there", stop])
    assert cut == whole[0][: whole[0].find(stop)] != whole[0]
    assert "".join(model.stream(PROMPTS[0], max_new_tokens=NEW, stop_strings=stop)) == cut


def test_a_stop_string_without_a_match_changes_nothing(model):
    settings = {"max_new_tokens": NEW, "temperature": 0.8, "seed": 3, "num_return_sequences": 2}
    assert model.generate(PROMPTS, stop_strings=["~~~"], **settings) == model.generate(PROMPTS, **settings)


def test_num_return_sequences_returns_a_list_per_prompt(model):
    settings = {"max_new_tokens": NEW, "temperature": 1.0, "num_return_sequences": 2}
    lists = model.generate(PROMPTS, **settings)
    assert [len(texts) for texts in lists] == [2, 2] and len({*lists[0], *lists[1]}) > 1
    assert model.generate(PROMPTS[0], **settings) == lists[0]
    assert model.generate(PROMPTS[0], max_new_tokens=NEW, num_return_sequences=1) == [
        model.generate(PROMPTS[0], max_new_tokens=NEW)
    ]


def test_num_beams_matches_beam_search(model):
    ids = model.encode_prompt("ab")
    found = lj.beam_search(
        model.config, model.params, np.array([ids]), np.array([len(ids)]), 3,
        max_new_tokens=NEW, eos_id=model.tokenizer.eos_ids, num_return_sequences=2,
    )  # fmt: skip
    prompt = model.tokenizer.decode(ids)
    expected = [
        model.tokenizer.decode([*ids, *np.asarray(found.tokens[0, text, : found.lengths[0, text]]).tolist()])
        for text in range(2)
    ]
    texts = model.generate("ab", max_new_tokens=NEW, num_beams=3, num_return_sequences=2)
    assert [prompt + text for text in texts] == expected
    assert model.generate("ab", max_new_tokens=NEW, num_beams=3) == texts[0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "random"])
def test_prompt_lookup_drafts_do_not_change_the_output(model, settings):
    options = {"max_new_tokens": 2 * NEW, "num_return_sequences": 2, **settings}
    prompts = ["abcabcab", "ab ab ab ab"]
    whole = model.generate(prompts, **options)
    drafting = {"draft": lj.PromptLookup(), "num_draft_tokens": 4}
    assert model.generate(prompts, **options, **drafting) == whole
    stop = whole[1][0][3:5]
    cut = model.generate(prompts, **options, **drafting, stop_strings=stop)
    assert cut == model.generate(prompts, **options, stop_strings=stop) != whole


def test_a_draft_model_needs_the_same_vocabulary(model, tmp_path):
    ids = [model.encode_prompt(text) for text in PROMPTS]
    out = model.speculate(ids, *model.sampling(), draft=model, num_draft_tokens=3, max_new_tokens=NEW)
    assert int(out.rounds) < NEW and (out.accepted == out.drafted).all()
    texts = [
        model.continuation(row, new[:count])
        for row, new, count in zip(ids, out.output.tokens, out.output.lengths, strict=True)
    ]
    assert texts == model.generate(PROMPTS, max_new_tokens=NEW)
    assert texts == model.generate(PROMPTS, max_new_tokens=NEW, draft=model, num_draft_tokens=3)

    other = tiny.write_model(tmp_path, CONFIG)
    tiny.write_vocabulary(tmp_path / "tok.bin", [*tiny.PIECES[:-1], "ba"])
    with pytest.raises(InputError, match=r"another vocabulary: token 287 is 'ba', and 'ab' in"):
        model.generate("ab", max_new_tokens=NEW, draft=lj.load(other))


def test_quantized_weights_and_cache(path, model):
    small = lj.load(path, scan_layers=False, bits=8)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(small.params))
    assert nbytes < sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)) / 2
    assert isinstance(small.generate("ab", max_new_tokens=NEW, cache_dtype="int8"), str)


def test_logits_processor_settings_take_effect(model):
    plain = model.generate("ab", max_new_tokens=NEW)
    ids = [
        token
        for token, _ in model.stream_tokens(model.encode_prompt("ab"), *model.sampling(), max_new_tokens=NEW)
    ]
    other = model.generate("ab", max_new_tokens=NEW, suppress_tokens=ids[:1])
    assert other != plain
    first = model.tokenizer.encode("q", add_bos=False)[-1]
    assert model.generate("ab", max_new_tokens=NEW, forced_tokens=[first]).lstrip().startswith("q")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temprature": 1.0}, "setting 'temprature' is unknown; did you mean temperature?"),
        ({"max_tokens": 5}, "setting 'max_tokens' is unknown; did you mean max_new_tokens?"),
        ({"key": jax.random.key(0)}, "setting 'key' is unknown; give seed=N, a whole number"),
        ({"stop": "a"}, "setting 'stop' is unknown; did you mean stop_strings?"),
        ({"xyz": 1.0}, "setting 'xyz' is unknown; use one of temperature, top_k"),
        ({"num_beams": 3, "temperature": 0.5}, "temperature"),
        ({"num_beams": 3, "stop_strings": "a"}, "stop_strings and num_beams cannot be combined"),
        ({"num_beams": 3, "draft": lj.PromptLookup()}, "draft and num_beams cannot be combined"),
        ({"draft": "prompt"}, "draft is a str; it must be"),
        ({"draft": lj.PromptLookup(), "num_draft_tokens": 0}, "num_draft_tokens is 0"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"num_return_sequences": 1.5}, "num_return_sequences is 1.5"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"stop_strings": [""]}, "stop_strings[0] is empty"),
        ({"presence_penalty": 3.0}, "presence_penalty is 3.0"),
        ({"suppress_tokens": [10**6]}, "suppress_tokens holds 1000000"),
        ({"cache_dtype": "int2"}, "cache_dtype is 'int2'"),
        ({"max_new_tokens": 10**6}, "the model's context has 32"),
    ],
)
def test_invalid_settings(model, settings, message):
    with pytest.raises(InputError) as error:
        model.generate("ab", **{"max_new_tokens": NEW, **settings})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a\0b", "\x00", "a b\x7f"])
def test_nul_and_control_characters_are_ordinary_text(model, text):
    assert isinstance(model.generate(text, max_new_tokens=2), str)


def test_a_lone_surrogate_is_rejected(model):
    with pytest.raises(lj.LlamaJaxError) as error:
        model.generate("ab\ud800", max_new_tokens=2)
    assert "surrogate" in str(error.value) and "\n" not in str(error.value)


def test_an_interrupted_stream_leaves_the_model_usable(model):
    """Closed early, and interrupted by an exception."""
    whole = model.generate("ab", max_new_tokens=NEW)
    stream = model.stream("ab", max_new_tokens=NEW)
    first = next(stream)
    stream.close()
    stream = model.stream("ab", max_new_tokens=NEW)
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert whole.startswith(first) and model.generate("ab", max_new_tokens=NEW) == whole


def test_load_rejects_other_numbers_of_bits(path):
    with pytest.raises(InputError, match="bits is 3; it must be 8 or 4"):
        lj.load(path, bits=3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_with_the_text(model, bad):
    params = jax.tree.map(lambda leaf: leaf, model.params)
    w_down = params["layers"][0]["feed_forward"]["w_down"]
    params["layers"][0]["feed_forward"]["w_down"] = w_down.at[3, 2].set(bad)
    damaged = dataclasses.replace(model, params=params)
    message = r"logits are not finite, because layers\.0\.feed_forward\.w_down in the weights holds NaN"
    for generate in (damaged.generate, lambda *args, **kw: list(damaged.stream(*args, **kw))):
        with pytest.warns(UserWarning, match=message):
            generate(PROMPTS[0], max_new_tokens=NEW)
