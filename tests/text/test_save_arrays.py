"""`save(config, params, path)`: arrays without a `Model`, and without a tokenizer."""

from __future__ import annotations

import warnings

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import ConfigError, InputError, MissingTokenizerError, TokenizerError
from llama_jax.text.convert import FORMATS
from tests import tiny
from tests.random_models import random_model

CONFIG = tiny.CONFIG.replace(tie_word_embeddings=False)


@pytest.fixture(scope="module")
def params():
    return random_model(5, CONFIG)[1]


def trees_equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_come_back_without_a_tokenizer(format, params, tmp_path):
    with warnings.catch_warnings(action="error"):
        path = lj.save(CONFIG, params, tmp_path / "out", format)
    config, found = lj.load_params(path)
    assert config == CONFIG
    assert trees_equal(found, params)
    with pytest.raises(MissingTokenizerError):
        lj.load(path).generate("a")


def test_layers_of_their_own_dtypes_keywords_and_a_mesh(params, tmp_path):
    unstacked = lj.unstack(params)
    lj.save(config=CONFIG, params=unstacked, path=tmp_path / "a", dtype="bfloat16")
    mesh = lj.make_mesh("fsdp=4,tensor=2")
    lj.save(CONFIG, lj.shard_params(params, mesh, CONFIG), path=tmp_path / "b", dtype="bfloat16")
    a, b = (lj.load_params(tmp_path / name, dtype="bfloat16")[1] for name in "ab")
    assert trees_equal(a, b)
    assert trees_equal(a, jax.tree.map(lambda x: x.astype("bfloat16"), params))


def test_a_tokenizer_may_be_given(params, tmp_path):
    tiny.write_vocabulary(tmp_path / "tok.bin", tiny.PIECES)
    by_path = lj.load(lj.save(CONFIG, params, tmp_path / "a", tokenizer=tmp_path / "tok.bin"))
    tokenizer = by_path.tokenizer
    by_object = lj.load(lj.save(CONFIG, params, tmp_path / "b", tokenizer=tokenizer))
    assert by_path.tokenizer.encode("ab a") == by_object.tokenizer.encode("ab a") != []
    smaller = random_model(5, CONFIG.replace(vocab_size=100))
    with pytest.raises(TokenizerError, match="288 tokens, the model 100"):
        lj.save(*smaller, tmp_path / "c", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("config", "change", "error", "message"),
    [
        ({"hidden_size": 32}, {}, ConfigError, r"embed.embedding \[288, 16\], not \[288, 32\]"),
        ({"num_hidden_layers": 3}, {}, ConfigError, r"attention.wk \[2, 16, 2, 4\], not \[3, 16, 2, 4\]"),
        ({"tie_word_embeddings": True}, {}, ConfigError, r"lm_head.kernel \[16, 288\], not absent"),
        ({}, {"final_norm": {}}, ConfigError, r"final_norm.scale absent, not \[16\]"),
        ({}, {"bits": 8}, InputError, "the parameters are quantized; load the model without bits"),
    ],
    ids=str,
)
def test_parameters_of_another_configuration_are_refused(config, change, error, message, params, tmp_path):
    params = lj.quantize(params, 8) if "bits" in change else {**params, **change}
    with pytest.raises(error, match=message):
        lj.save(CONFIG.replace(**config), params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
