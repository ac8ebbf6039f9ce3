"""Grammars in `Model`, `Conversation` and `llama-jax generate`: the texts, and what is refused."""

from __future__ import annotations

import io
import json
import re
import sys
from types import SimpleNamespace

import jsonschema
import pytest

import llama_jax as lj
from llama_jax import cli
from llama_jax.errors import GrammarError, InputError
from llama_jax.tokenizer import load_tokenizer
from tests import tiny

NEW = 16
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"), tiny.CONFIG.replace(num_hidden_layers=1))


@pytest.fixture(scope="module")
def model(path):
    return lj.load(path, scan_layers=False)


@pytest.fixture
def schema_file(tmp_path):
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    return file


@pytest.fixture
def generate(path, capsys, monkeypatch):
    """Runs `llama-jax generate` in this process."""

    def generate(*args):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
        status = cli.main(
            ["generate", str(path), "--prompt", "ab", "--max-new-tokens", str(NEW), *map(str, args)]
        )
        return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr(), strict=True)))

    return generate


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0, "seed": 3},
        {"num_beams": 3},
        {"draft": lj.PromptLookup()},
        {"stop_strings": "~"},
    ],
    ids=str,
)
def test_every_way_to_generate_keeps_to_a_schema(model, settings):
    """Decoded by itself: the space that SentencePiece would drop at the start is no part of the text."""
    jsonschema.validate(
        json.loads(model.generate("ab", json_schema=SCHEMA, max_new_tokens=NEW, **settings)), SCHEMA
    )


def test_choices_a_regex_and_a_grammar_for_each_prompt(model):
    assert model.generate("ab", choices=["yes", "no"], max_new_tokens=NEW) in ("yes", "no")
    number = lj.grammar(model.tokenizer, regex="[0-9]{3}")
    first, free, third = model.generate(["ab", "b", "c"], grammar=[number, None, number], max_new_tokens=NEW)
    assert re.fullmatch("[0-9]{3}", first) and re.fullmatch("[0-9]{3}", third)
    assert free == model.generate(["ab", "b", "c"], max_new_tokens=NEW)[1]
    several = model.generate(
        "ab", grammar=[number], max_new_tokens=NEW, num_return_sequences=3, temperature=1.0
    )
    assert all(re.fullmatch("[0-9]{3}", text) for text in several)
    pieces = list(model.stream("ab", grammar=number, max_new_tokens=NEW))
    assert "".join(pieces) == model.generate("ab", grammar=number, max_new_tokens=NEW)


def test_a_conversation_answers_by_a_grammar(model):
    chat = lj.Conversation(model, template="llama-2")
    assert "".join(chat.say("a", choices=["yes", "no"], max_new_tokens=8)) in ("yes", "no")
    assert chat.finish_reason == "stop"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"regex": "a", "choices": ["a"]}, "regex and choices are given; give one of them"),
        ({"grammar": "a"}, "grammar is a str"),
        ({"regx": "a"}, "setting 'regx' is unknown; did you mean regex?"),
    ],
)
def test_what_is_refused(model, settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        model.generate("ab", max_new_tokens=NEW, **settings)


def test_a_grammar_of_another_vocabulary_of_the_same_size(model, tmp_path):
    pieces = [*tiny.PIECES[:-1], "ac"]
    tiny.write_vocabulary(tmp_path / "tok.bin", pieces)
    other = lj.grammar(load_tokenizer(tmp_path / "tok.bin"), choices=["a"])
    with pytest.raises(GrammarError, match="built for another vocabulary"):
        model.generate("ab", grammar=other)


def test_generate_on_the_command_line(generate, schema_file):
    done = generate("--json-schema", schema_file)
    assert done.status == 0, done.err
    jsonschema.validate(json.loads(done.out.removeprefix("ab")), SCHEMA)
    found = json.loads(generate("--choices", '["a, b", "c"]', "--json").out)
    assert found["text"] in ("a, b", "c")
    assert found["finish_reason"] == "stop"
    assert generate("--choices", "yes,no").out in ("abyes\n", "abno\n")
    beams = json.loads(generate("--regex", "[0-9]{3}", "--num-beams", 3, "--json").out)
    assert re.fullmatch("[0-9]{3}", beams["text"])


def test_an_unfinished_text_says_so(generate):
    done = generate("--regex", "[a-c]{20}")
    assert done.status == 0
    assert "the text is unfinished" in done.err
    assert json.loads(generate("--regex", "[a-c]{20}", "--json").out)["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--regex", "("], "regex is not a regular expression: missing )"),
        (["--regex", "a", "--choices", "a"], "--choices: not allowed with argument --regex"),
        (["--choices", "a,,b"], "separate texts by single commas"),
        (["--choices", "[1]"], "it must be a list of texts"),
        (["--choices", "[1"], "begins like a JSON list and is none"),
        (["--json-schema", "FOLDER"], "cannot be read: Is a directory"),
        (["--json-schema", "FOLDER/none.json"], "cannot be read: No such file"),
        (["--json-schema", "FOLDER/bad.json"], "is not JSON: Expecting value"),
        (["--json-schema", "FOLDER/list.json"], "holds a list; a schema is an object"),
        (
            ["--json-schema", "FOLDER/not.json"],
            "json_schema at #/properties/x has not, which is not supported",
        ),
    ],
    ids=str,
)
def test_bad_input_is_one_line_before_the_model_is_loaded(generate, tmp_path, monkeypatch, args, message):
    monkeypatch.setattr("llama_jax.console.loading.load", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "bad.json").write_text("schema")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "not.json").write_text('{"properties": {"x": {"not": {}}}}')
    done = generate(*[arg.replace("FOLDER", str(tmp_path)) for arg in args])
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1
    assert message in done.err
