"""Passkey and needle tests: texts are what they say, what is found is what is generated, maps are drawn."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import InputError
from llama_jax.eval import heat_map, retrieval
from llama_jax.eval.retrieval import FILLER, make_text, split_sentences


@pytest.fixture(scope="module")
def model(shared_data) -> lj.Model:
    return lj.load(shared_data / "stories260K" / "stories260K.bin")


@pytest.mark.parametrize("kind", ["passkey", "needle"])
@pytest.mark.parametrize(("length", "depth"), [(200, 0.0), (300, 0.5), (431, 1.0)])
def test_a_text_has_its_length_and_the_key_at_its_depth(model, kind, length, depth):
    sentences = list(FILLER) if kind == "passkey" else split_sentences(retrieval.PASSAGE)
    rng = np.random.default_rng(3)
    context, key = make_text(model.tokenizer, kind, sentences, length, depth, rng)
    longest = max(len(model.tokenizer.encode(sentence)) for sentence in sentences)
    assert length - longest <= len(context) + len(key) <= length
    text, answer = model.tokenizer.decode(context), model.tokenizer.decode(key).strip()
    words = retrieval.WORDINGS[kind]
    needle, rest = words.needle.partition("{")[0], words.question.partition("{")[0]
    assert len(answer) == 5 and text.count(answer) == (2 if kind == "passkey" else 1)
    assert text.startswith(words.task) and not text.endswith(answer) and rest in text[-120:]
    filler = (text.find(needle) - len(words.task)) / (text.rfind(rest) - len(words.task))
    assert abs(filler - depth) < 0.35


def test_found_is_what_greedy_decoding_writes(model):
    found = retrieval.retrieval(model, "passkey", [150, 200], [0.0, 1.0], samples=2, batch_size=2)
    assert np.shape(found.found) == np.shape(found.logprob) == (2, 2)
    assert all(value < 0 for row in found.logprob for value in row)
    rng = np.random.default_rng(0)
    context, key = make_text(model.tokenizer, "passkey", FILLER, 150, 0.0, rng)
    out = model.generate(model.tokenizer.decode(context), max_new_tokens=len(key))
    assert (out.strip() == model.tokenizer.decode(key).strip()) == bool(found.found[0][0] == 1)


@pytest.mark.parametrize(
    ("lengths", "depths", "message"),
    [
        ([1024], [0.5], "length 1024 is beyond the model's context of 512 positions"),
        ([20], [0.5], "length 20 is too short: the passkey and its question take"),
        ([200], [1.5], "depth 1.5 must be from 0, the beginning, to 1, the end"),
        ([0], [0.5], "length is 0"),
    ],
)
def test_lengths_and_depths_out_of_range(model, lengths, depths, message):
    with pytest.raises(InputError, match=message):
        retrieval.retrieval(model, "passkey", lengths, depths)


def test_a_haystack_without_a_sentence():
    with pytest.raises(InputError, match="no sentence"):
        split_sentences(" \n ")


def test_maps_are_drawn_and_the_page_loads_nothing():
    maps, lengths, depths = {"a <b>": [[0.0, 1.0], [0.5, 0.25]]}, [128, 2048], [0.0, 1.0]
    assert heat_map.png(maps, lengths, depths, "found")[:4] == b"\x89PNG"
    text = heat_map.page(maps, lengths, depths, "found", title="t", notes=["n & m"])
    assert "a &lt;b&gt;" in text and "n &amp; m" in text and "<b>" not in text
    assert not any(word in text for word in ("http", "src=", "<script", "url("))
    rows = [row.split("<td")[1:] for row in text.split("<tr>")[2:]]
    assert [[cell.partition(">")[2].partition("<")[0] for cell in row] for row in rows] == [
        ["0%", "50%"],  # depth 0 of both lengths
        ["100%", "25%"],
    ]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"need matplotlib: pip install 'llama-jax\[plot\]'"):
        heat_map.check_plots()
