"""Grammars of requests in a batch: each row keeps to its own, and is what `generate` gives alone."""

from __future__ import annotations

import json
import re

import jax
import jsonschema
import numpy as np
import openai
import pytest

import llama_jax as lj
from llama_jax.errors import InputError
from llama_jax.serving.batcher import Batcher
from llama_jax.serving.requests import Request
from tests.decoding.compiled import counting_compiles
from tests.messages import user
from tests.serving import http

NEW = 48
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 3}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(running):
    return running.model


@pytest.fixture(scope="module")
def batcher(model):
    return Batcher(model.config, model.params, batch_size=3, max_length=128)


def request(model, number, grammar):
    return Request(
        model.encode_prompt("ab c"[: 1 + number % 4]),
        12 + number,
        lj.Sampling(temperature=(0.0, 1.0, 1.5)[number % 3]),
        model.tokenizer.eos_id,
        jax.random.key(number),
        top_logprobs=2 * (number % 2),
        grammar=grammar,
    )


def alone(model, request):
    tokens = np.array([request.tokens])
    out = lj.generate(
        model.config,
        model.params,
        tokens,
        np.array([tokens.size]),
        request.key,
        request.sampling,
        max_new_tokens=request.max_new_tokens,
        eos_id=request.eos_id,
        grammar=request.grammar,
    )
    count = int(out.lengths[0])
    return out.tokens[0, :count].tolist(), out.logprobs[0, :count]


def test_rows_with_grammars_of_their_own_and_without_are_those_of_generate(model, batcher):
    patterns = ["[ab]{2,6}", None, "(ab|c)+c", None, "a*b", "[0-9]{3}", "b+", "[a-c]{1,9}a", None, "c{4}"]
    grammars = [pattern and lj.grammar(model.tokenizer, regex=pattern) for pattern in patterns]
    assert len({id(grammar) for grammar in grammars if grammar}) > 4  # places there are at first
    requests = [request(model, number, grammar) for number, grammar in enumerate(grammars)]
    for one, result, pattern in zip(requests, batcher.run(requests), patterns, strict=True):
        tokens, logprobs = alone(model, one)
        assert result.tokens == tokens
        np.testing.assert_allclose(result.logprobs, logprobs, atol=3e-5)
        if pattern and result.finish_reason == "stop":
            text = model.tokenizer.decode(result.tokens[:-1])
            assert re.fullmatch(pattern, text)


def test_another_grammar_of_the_same_size_compiles_nothing_nor_do_rows_without(model, batcher):
    first, second = (lj.grammar(model.tokenizer, regex=regex) for regex in ("a{5}", "b{7}"))
    batcher.run([request(model, 1, first), request(model, 2, None)])
    batcher.run([request(model, number, None) for number in range(3)])
    with counting_compiles() as compiled:
        batcher.run([request(model, 3, second), request(model, 4, None)])
        batcher.run([request(model, number, None) for number in range(3)])
    assert not compiled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eos_id": None}, "a grammar needs eos_id"),
        ({"grammar": "a+"}, "grammar is a str; make one with llama_jax.grammar"),
    ],
)
def test_a_grammar_that_cannot_work_is_refused(model, batcher, options, message):
    grammar = lj.grammar(model.tokenizer, regex="a+")
    given = {"tokens": [1], "max_new_tokens": 2, "eos_id": 2, "grammar": grammar} | options
    with pytest.raises(InputError, match=message):
        batcher.submit(Request(**given))
    other = lj.Grammar(np.zeros(5, np.int32), *grammar.arrays[1:])
    with pytest.raises(InputError, match="a vocabulary of 5 tokens and the model has 288"):
        batcher.submit(Request([1], 2, eos_id=2, grammar=other))
    assert batcher.waiting == 0


# Over HTTP


def of_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


def test_the_official_client_gets_texts_of_its_schema(model, client):
    options = {"model": http.NAME, "temperature": 1.0, "seed": 5, "max_tokens": NEW}
    answer = client.chat.completions.create(
        messages=[user("hello")], response_format=of_schema(SCHEMA), n=3, **options
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    text = model.generate(
        "ab",
        max_new_tokens=NEW,
        temperature=1.0,
        seed=5,
        grammar=lj.grammar(model.tokenizer, json_schema=SCHEMA),
    )
    stream = client.completions.create(
        prompt="ab", stream=True, extra_body={"response_format": of_schema(SCHEMA)}, **options
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == text
    jsonschema.validate(json.loads(text), SCHEMA)


def test_any_json_object_can_be_asked_for(client):
    answer = client.chat.completions.create(
        model=http.NAME,
        messages=[user("hello")],
        response_format={"type": "json_object"},
        temperature=0.0,
        max_tokens=NEW,
        logprobs=True,
    )
    text = answer.choices[0].message.content
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"type": "json_schema"}, "response_format of type 'json_schema' has no schema"),
        ({"type": "x"}, "response_format of type 'x' is unknown"),
        (of_schema({"type": "object", "if": {}}), "response_format: .*'?if'?"),
        (of_schema({"type": "string", "pattern": "(?=a)b"}), "response_format: "),
    ],
)
def test_a_format_that_cannot_be_is_a_400(client, given, message):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=http.NAME, prompt="a", extra_body={"response_format": given})
    assert re.search(message, error.value.body["message"])
    assert error.value.body["param"] == "response_format"
