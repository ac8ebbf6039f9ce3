"""A thousand random schemas and expressions: what was sampled under them, and has ended, is valid."""

from __future__ import annotations

import contextlib
import json
import re

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import llama_jax as lj
from llama_jax.errors import GrammarError
from tests.structured_output.sampler import GRAMMARS, sample_texts

BATCHES = 63  # of 8: about 500 of each kind
many = settings(
    max_examples=BATCHES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
NAMES = ("a", "b", "name", 'q"', "é")


def bounded(draw_from, *names):
    """Two bounds in order, each of which may be absent."""
    pairs = st.tuples(draw_from, draw_from).map(sorted)
    return st.tuples(pairs, st.booleans(), st.booleans()).map(
        lambda x: {name: value for name, value, there in zip(names, x[0], x[1:], strict=True) if there}
    )


SCALARS = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": ["string", "null"]}),
    bounded(st.integers(-300, 300), "minimum", "maximum").map(lambda x: {"type": "integer", **x}),
    bounded(st.integers(-30, 30).map(lambda x: x / 4), "minimum", "exclusiveMaximum").map(
        lambda x: {"type": "number", **x}
    ),
    bounded(st.integers(0, 5), "minLength", "maxLength").map(lambda x: {"type": "string", **x}),
    st.sampled_from(["^[a-f]+$", "[0-9]{2}", r"^\d|x.$", '^"?$']).map(
        lambda x: {"type": "string", "pattern": x}
    ),
    st.sampled_from(["date", "time", "date-time", "ipv4", "uuid"]).map(
        lambda x: {"type": "string", "format": x}
    ),
    st.lists(st.sampled_from(["x", 'a "b"', 1, 2.5, None, True, ["é", {}]]), min_size=1).map(
        lambda x: {"enum": x}
    ),
    st.sampled_from(["only", 0, {"k": [1]}]).map(lambda x: {"const": x}),
)


def containers(inner):
    """Arrays, objects and alternatives of schemas."""
    arrays = st.tuples(inner, bounded(st.integers(0, 3), "minItems", "maxItems")).map(
        lambda x: {"type": "array", "items": x[0], **x[1]}
    )
    tuples = st.tuples(st.lists(inner, min_size=1, max_size=2), st.booleans(), st.integers(0, 2)).map(
        lambda x: {"type": "array", "prefixItems": x[0], "items": x[1] and {"type": "null"}, "minItems": x[2]}
    )
    objects = st.tuples(
        st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
        st.sets(st.sampled_from(NAMES[:3])),
        st.booleans(),
    ).map(
        lambda x: {
            "type": "object",
            "properties": x[0],
            "required": sorted(x[1] & x[0].keys()),
            "additionalProperties": x[2],
        }
    )
    maps = inner.map(lambda x: {"type": "object", "additionalProperties": x, "maxProperties": 2})
    unions = st.lists(inner, min_size=1, max_size=3).map(lambda x: {"anyOf": x})
    return st.one_of(arrays, tuples, objects, objects, maps, unions)


SCHEMAS = st.recursive(SCALARS, containers, max_leaves=4)

CHARACTERS = st.sampled_from(["a", "b", "th", "é", "日", r"\.", r"\n", ".", "[a-c]", "[^a]", r"[0-9]", " "])


def compound(inner):
    """Concatenations, alternatives and repetitions of expressions."""
    return st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda x: f"(?:{'|'.join(x)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{0,3}", "*?"])).map(
            lambda x: f"(?:{x[0]}){x[1]}"
        ),
    )


EXPRESSIONS = st.recursive(CHARACTERS, compound, max_leaves=6)


def built(tokenizer, kind, sources):
    """The grammars that there are: some random schemas accept nothing."""
    found = []
    for source in sources:
        with contextlib.suppress(GrammarError):  # some accept nothing
            found.append((source, lj.grammar(tokenizer, **{kind: source})))
    return found


@pytest.fixture(scope="module")
def ended():
    """How many texts have ended, by kind."""
    return {"json_schema": 0, "regex": 0}


@many
@given(sources=st.lists(SCHEMAS, min_size=GRAMMARS, max_size=GRAMMARS))
def test_texts_under_a_schema_are_valid(tokenizer, ended, sources):
    pairs = built(tokenizer, "json_schema", sources)
    for (schema, _), texts in zip(pairs, sample_texts(tokenizer, [g for _, g in pairs]), strict=True):
        check = jsonschema.Draft202012Validator(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
        for ids in texts:
            check.validate(json.loads(tokenizer.decode(ids)))
            ended["json_schema"] += 1


@many
@given(sources=st.lists(EXPRESSIONS, min_size=GRAMMARS, max_size=GRAMMARS))
def test_texts_under_an_expression_match_it(tokenizer, ended, sources):
    pairs = built(tokenizer, "regex", sources)
    for (regex, _), texts in zip(pairs, sample_texts(tokenizer, [g for _, g in pairs]), strict=True):
        for ids in texts:
            assert re.fullmatch(regex, tokenizer.decode(ids)), (regex, ids)
            ended["regex"] += 1


def test_most_texts_had_ended(ended):
    assert ended["json_schema"] > 1000 < ended["regex"]
