"""`llama_jax.grammar`: what it refuses, by name, and what its automata are."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import GrammarError
from llama_jax.sandbox.process import Answer
from llama_jax.structured_output import compiler, token_automaton, worker
from llama_jax.structured_output.json_schema import regex_of


def matches(schema, text):
    """Whether a text is one of those that may be written under a schema."""
    automaton, state = compiler.COMPILER.compile(regex_of(schema), "json_schema"), 0
    for byte in text.encode():
        state = -1 if state < 0 else automaton.transitions[state, byte]
    return state >= 0 and automaton.accepting[state]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "none of regex, json_schema and choices given; give exactly one"),
        ({"regex": "a", "choices": ["a"]}, "regex and choices given; give exactly one"),
        ({"regex": 3}, "regex is a int"),
        ({"regex": "("}, "regex is not a regular expression: missing"),
        ({"regex": "a)(b"}, r"regex is not a regular expression: unbalanced \) at position 1"),
        ({"regex": "[a"}, "regex is not a regular expression: unterminated character set"),
        ({"regex": "a(?=b)"}, "regex has look-around, which"),
        ({"regex": r"(a)\1"}, "regex has a backreference, which"),
        ({"regex": r"a\b"}, "regex has a word boundary, which"),
        ({"regex": "a$b"}, "regex has an anchor that is neither at its start nor at its end"),
        ({"regex": "[a&&b]"}, "regex accepts no text"),
        ({"regex": r"(?P<a>\p{Foo})"}, "Rust's regex crate"),
        ({"choices": []}, r"choices is '\[\]'; it must be a list with at least one text"),
        ({"choices": "yes"}, "choices is 'yes'; it must be a list"),
        ({"choices": ["a", 3]}, r"choices\[1\] is 3; it must be a string"),
        ({"choices": ["\ud800"]}, r"choices\[0\] has a lone surrogate"),
        ({"json_schema": "{"}, "json_schema is not JSON: Expecting property name"),
        ({"json_schema": '{"const": NaN}'}, "json_schema is not JSON: NaN"),
        ({"json_schema": [1]}, "json_schema is a list"),
        ({"json_schema": {"const": float("inf")}}, "json_schema holds inf, which is not JSON"),
        ({"json_schema": False}, "json_schema accepts no value"),
        ({"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}}, "json_schema accepts no value"),
        ({"json_schema": {"$ref": "#"}}, "json_schema accepts no value"),
    ],
    ids=str,
)
def test_what_is_no_grammar_is_refused(tokenizer, given, message):
    with pytest.raises(GrammarError, match=message) as error:
        lj.grammar(tokenizer, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"not": {}}, "has not, which is not supported"),
        ({"type": "number", "multipleOf": 3}, "has multipleOf"),
        ({"type": "array", "uniqueItems": True}, "has uniqueItems"),
        ({"type": "array", "items": [{}]}, "has a list of items; write it as prefixItems"),
        ({"type": "object", "patternProperties": {"a": {}}}, "has patternProperties"),
        ({"type": "object", "minProperties": 2}, "has minProperties"),
        ({"type": "string", "format": "regex"}, "has format 'regex'; supported are date, date-time"),
        ({"type": "string", "format": "date", "maxLength": 3}, "has several of pattern, format and a length"),
        ({"type": "string", "maxLength": -1}, "has maxLength -1"),
        ({"type": "integer", "minimum": True}, "has minimum True; it must be a number"),
        ({"type": "text"}, "has type 'text'; the types are string"),
        ({"enum": []}, "must be a list that is not empty"),
        ({"enum": ["a"], "maxLength": 3}, "has enum beside maxLength"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "has branches 0 and 1 that may both be valid"),
        ({"allOf": [{}, {}]}, "has several schemas"),
        ({"$ref": "#/nowhere"}, "has \\$ref '#/nowhere', which does not exist"),
        ({"$ref": "other.json"}, "has \\$ref 'other.json'; only references within the schema"),
        ({"type": "string", "anyOf": [{"type": "integer"}]}, "has a type beside branches with another"),
        ("text", "is text; a schema is an object or a boolean"),
    ],
    ids=str,
)
def test_what_a_schema_cannot_have_is_named_with_its_path(tokenizer, part, message):
    schema = {"type": "object", "properties": {"x": {"type": "array", "items": part}}, "required": ["x"]}
    with pytest.raises(GrammarError, match=f"^json_schema at #/properties/x/items(/\\w+)? {message}"):
        lj.grammar(tokenizer, json_schema=schema)


@pytest.mark.parametrize("pattern", ["(?i)a", "(?=a)", "("])
def test_a_pattern_that_cannot_be_used_is_refused(tokenizer, pattern):
    with pytest.raises(GrammarError):
        lj.grammar(tokenizer, json_schema={"type": "string", "pattern": pattern})


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        (
            {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
            ["-3", "0", "11"],
            ["-4", "12", "007", "1.0"],
        ),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, ["0.5", "1", "0.01"], ["0", "1.1", "-1"]),
        ({"type": "string", "pattern": "b"}, ['"abc"', '"\\"b"'], ['"ac"', "b", '"b"b"']),
        ({"type": "string", "pattern": '^"[^x]?$'}, ['"\\"a"', '"\\""'], ['""', '"\\"x"', '"\\"""']),
        ({"type": "string", "maxLength": 2}, ['"éé"', '"\\n\\n"', '""'], ['"abc"', '"\n"']),
        (
            {
                "type": "object",
                "properties": {"a": {"const": 1}, "b": {}, "c": {"type": "null"}},
                "required": ["b"],
            },
            ['{"b":true}', '{"a":1, "b": "x","c":null}', '{"b":[1,2]}'],
            ["{}", '{"a":1}', '{"a":1,"b":0,}', '{"c":null,"b":1}'],
        ),
        (
            {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}},
            ["{}", '{"b":2}'],
            ['{,"b":2}'],
        ),
        (
            {"type": "object", "required": ["k"], "additionalProperties": {"type": "null"}},
            ['{"k":null}'],
            ["{}"],
        ),
        (
            {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "items": False, "minItems": 1},
            ["[1]", "[1, 2]"],
            ["[]", "[1,2,3]", "[2]"],
        ),
        (
            {"type": "array", "items": {"const": 0}, "minItems": 2, "maxItems": 3},
            ["[0,0]", "[0,0,0]"],
            ["[0]", "[0,0,0,0]"],
        ),
        ({"type": ["string", "integer"], "enum": ["x", 1, 1.5, True]}, ['"x"', "1"], ["1.5", "true"]),
        (
            {
                "$defs": {"t": {"type": "object", "properties": {"t": {"$ref": "#/$defs/t"}}}},
                "$ref": "#/$defs/t",
            },
            ["{}", '{"t":{"t":{}}}'],
            ['{"t":1}', '{"t":' * 9 + "{}" + "}" * 9],
        ),
        (
            {
                "oneOf": [
                    {"type": "object", "properties": {"k": {"const": c}}, "required": ["k"]} for c in "ab"
                ]
            },
            ['{"k":"a"}', '{"k":"b"}'],
            ['{"k":"c"}'],
        ),
    ],
    ids=str,
)
def test_schemas(schema, valid, invalid):
    for text in valid:
        json.loads(text)
        assert matches(schema, text), text
    for text in invalid:
        assert not matches(schema, text), text


def test_longer_alternatives_and_anchors(tokenizer):
    """What outlines-core alone gets wrong: it would end at the shortest of alternatives."""
    for regex, texts in (
        ("a|ab", ["a", "ab"]),
        ("^a(bc)?$", ["a", "abc"]),
        ("^x|y$", ["x", "y"]),
        ("", [""]),
    ):
        grammar = lj.grammar(tokenizer, regex=regex)
        for text in ["a", "ab", "abc", "x", "y", ""]:
            state = 0
            for id in tokenizer.encode(text):
                state = -1 if state < 0 else grammar.transitions[state][grammar.classes[id]]
            assert (state >= 0 and grammar.accepting[state]) == (text in texts), (regex, text)


def test_too_large_an_automaton_is_refused(tokenizer, monkeypatch):
    with pytest.raises(GrammarError, match="limit is 1048576"):
        compiler.COMPILER.compile("a" * (1 << 20) + "b", "regex")
    here = compiler.Compiler()
    monkeypatch.setattr(here._worker, "request", lambda regex, _: Answer(*worker.respond(regex), False))
    monkeypatch.setattr(worker, "MAX_STATES", 20)
    with pytest.raises(GrammarError, match=r"its automaton over bytes has 3\d states, and the limit is 20"):
        here.compile("[ab]{30}", "regex")
    monkeypatch.setattr(token_automaton, "MAX_BYTES", 1 << 16)
    with pytest.raises(
        GrammarError, match=r"regex is too large: its automaton has \d+ or more states and \d+ classes"
    ):
        lj.grammar(tokenizer, regex=".{1,200}")
    monkeypatch.setattr(compiler, "TIMEOUT", 0.3)
    slow = compiler.Compiler()
    with pytest.raises(GrammarError, match="regex is too large: its automaton takes more than"):
        slow.compile("(?:a|b)*a(?:a|b){26}", "regex")
    assert slow.compile("ab", "regex").accepting.any()  # in another process
    slow.close()


def test_states_that_differ_in_no_text_are_one(tokenizer):
    """The tail of an expression is shared by all that comes before it."""
    one = lj.grammar(tokenizer, regex="(?:a|b)[0-9]{20}")
    many = lj.grammar(tokenizer, regex="a[0-9]{20}|b[0-9]{20}")
    assert one.states == many.states == 22


def test_a_grammar_is_built_once_and_shown_by_its_size(tokenizer):
    grammar = lj.grammar(tokenizer, choices=["a", "b"])
    assert lj.grammar(tokenizer, regex="^a|b$") is not grammar
    assert lj.grammar(tokenizer, choices=["a", "b"]) is grammar
    assert re.fullmatch(r"Grammar\(2 states, 64 classes of \d+ tokens, 0\.\d MB\)", repr(grammar))
    assert grammar.nbytes == sum(np.asarray(x).nbytes for x in grammar.arrays)


def test_a_pydantic_model_is_a_schema(tokenizer):
    class Cat:
        """What pydantic models have."""

        @staticmethod
        def model_json_schema():
            return {"type": "boolean"}

    assert lj.grammar(tokenizer, json_schema=Cat) is lj.grammar(tokenizer, json_schema='{"type": "boolean"}')
