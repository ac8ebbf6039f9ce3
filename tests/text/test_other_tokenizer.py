"""A tokenizer from another path: the way out where a model's own cannot be read."""

from __future__ import annotations

import json

import pytest

import llama_jax as lj
from llama_jax.cli import main
from llama_jax.errors import TokenizerError
from llama_jax.text.convert import convert
from tests import tiny
from tests.random_models import random_model
from tests.tokenizer import vocabularies


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """A GGUF file whose pre-tokenizer has no known name, and its tokenizer.json."""
    folder = tmp_path_factory.mktemp("unknown")
    content = vocabularies.byte_level_json()
    source = vocabularies.write_json(folder / "tokenizer.json", content)
    config, params = random_model(5, tiny.CONFIG.replace(vocab_size=331))
    path = lj.save(config, params, folder / "a.gguf", tokenizer=source)
    path.write_bytes(path.read_bytes().replace(b"gpt-2", b"gpt-x"))
    return path, source


def test_an_unknown_pre_tokenizer_names_a_way_out_that_works(unknown, tmp_path):
    path, source = unknown
    message = "tokenizer.ggml.pre is 'gpt-x', an unknown pre-tokenizer; .* with tokenizer \\(--tokenizer\\)"
    with pytest.raises(TokenizerError, match=message):
        lj.load(path)
    expected = lj.load(path, tokenizer=source).generate("the fox", max_new_tokens=4)
    converted = lj.load(convert(path, tmp_path / "out", tokenizer=source))
    assert converted.generate("the fox", max_new_tokens=4) == expected


@pytest.mark.parametrize("verb", ["generate", "verify"])
def test_verbs_take_the_tokenizer(verb, unknown, capsys):
    path, source = map(str, unknown)
    rest = {"generate": ["--prompt", "the", "--max-new-tokens", "4"], "verify": [path]}
    assert main([verb, path, *rest[verb], "--json"]) == (2 if verb == "generate" else 1)
    capsys.readouterr()
    assert main([verb, path, *rest[verb], "--tokenizer", source, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    if verb == "verify":
        assert f"encoded with {source}" in str(found["text"]["notes"])


@pytest.mark.parametrize("verb", ["chat", "bench", "convert"])
def test_verbs_that_have_the_option(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "--tokenizer PATH" in capsys.readouterr().out
