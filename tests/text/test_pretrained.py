"""`load`, `load_params` and `Model` on a tiny random model."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.decoding.arguments import pad_right
from llama_jax.errors import CheckpointError, InputError, TokenizerError
from llama_jax.hub import known
from llama_jax.text.pretrained import resolve
from tests import tiny

NEW = 6  # the same everywhere, to compile few programs
PROMPTS = ["ab", "a b c", "the quick brown fox"]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(tiny_path):
    return lj.load(tiny_path)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompt_in_a_batch_equals_the_prompt_alone(model, temperature):
    settings = {"max_new_tokens": NEW, "temperature": temperature, "seed": 3}
    batch = model.generate(PROMPTS, **settings)
    # Each row samples with its own key, so with a temperature only row 0 can be compared.
    alone = [model.generate(prompt, **settings) for prompt in (PROMPTS if temperature == 0 else PROMPTS[:1])]
    assert batch[: len(alone)] == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_joined_equals_generate(model, temperature):
    settings = {"max_new_tokens": NEW, "temperature": temperature, "seed": 5}
    for prompt in PROMPTS:
        assert "".join(model.stream(prompt, **settings)) == model.generate(prompt, **settings)


def test_a_continuation_is_a_suffix_of_the_decoded_text(model):
    ids = model.encode_prompt("ab")
    sampling = lj.Sampling(temperature=0.0)
    new = [token for token, _ in model.stream_tokens(ids, sampling, max_new_tokens=NEW)]
    whole, prompt = model.tokenizer.decode(ids + new), model.tokenizer.decode(ids)
    assert prompt + model.generate("ab", max_new_tokens=NEW) == whole


def test_an_eos_token_ends_the_text(model):
    ids = model.encode_prompt("ab")
    logits = lj.forward(model.config, model.params, np.array([ids], np.int32))
    argmax = int(logits[0, -1].argmax())

    class Tokenizer:
        eos_ids = (argmax,)
        encode, stream = model.tokenizer.encode, model.tokenizer.stream

    ending = lj.Model(model.config, model.params, Tokenizer(), model.path)
    pairs = list(ending.stream_tokens(ids, lj.Sampling(temperature=0.0), max_new_tokens=NEW))
    assert [token for token, _ in pairs] == [argmax]


def test_an_empty_prompt_is_bos_alone(model):
    assert model.encode_prompt("") == [model.tokenizer.bos_id]
    assert isinstance(model.generate("", max_new_tokens=NEW), str)


def test_unstacked_has_the_same_values(tiny_path, model):
    unstacked = lj.load(tiny_path, scan_layers=False)
    assert isinstance(model.params["layers"], dict)
    assert isinstance(unstacked.params["layers"], tuple)
    jax.tree.map(np.testing.assert_array_equal, lj.unstack(model.params), unstacked.params)
    assert unstacked.generate("ab", max_new_tokens=NEW) == model.generate("ab", max_new_tokens=NEW)


def test_load_params_needs_no_tokenizer(tmp_path):
    path = tiny.write_model(tmp_path)
    model = lj.load(path, "bfloat16", scan_layers=False)
    (tmp_path / "tok.bin").unlink()
    config, params = lj.load_params(path, "bfloat16", scan_layers=False)
    assert config == model.config
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    with pytest.raises(InputError, match="dtype is 'int3'"):
        lj.load_params(path, "int3")


def test_dtype_of_the_leaves(tiny_path):
    leaves = jax.tree.leaves(lj.load(tiny_path, "bfloat16").params)
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}


def test_pad_right():
    tokens, lengths = pad_right([[5], [6, 7, 8]])
    assert tokens.tolist() == [[5, 0, 0], [6, 7, 8]]
    assert lengths.tolist() == [1, 3]


def test_progress_ends_at_the_total(tiny_path):
    seen = []
    lj.load(tiny_path, progress=lambda done, total, name: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_misspelled_name_gets_a_suggestion():
    with pytest.raises(CheckpointError) as error:
        resolve("smolm2-135m")
    assert "did you mean smollm2-135m?" in one_line(error)


@pytest.mark.parametrize("name", ["nothing", "a/b\nc", "~nobody-of-that-name/x", "long" * 2000, "nul\0"])
def test_a_missing_path_is_named(name):
    with pytest.raises(CheckpointError) as error:
        lj.load(name)
    assert repr(name)[:100] in one_line(error)
    assert all(name in str(error.value) for name in known.KNOWN)


def test_vocabulary_of_another_size(tmp_path):
    path = tiny.write_model(tmp_path)
    tiny.write_vocabulary(tmp_path / "tok.bin", [*tiny.PIECES, "extra"])
    with pytest.raises(TokenizerError) as error:
        lj.load(path)
    message, size = one_line(error), tiny.CONFIG.vocab_size
    assert str(size) in message
    assert str(size + 1) in message


def test_no_vocabulary(tmp_path):
    path = tiny.write_model(tmp_path)
    (tmp_path / "tok.bin").unlink()
    with pytest.raises(TokenizerError) as error:
        lj.load(path).generate("a")
    assert "tokenizer" in one_line(error)


def test_unknown_dtype(tiny_path):
    with pytest.raises(InputError) as error:
        lj.load(tiny_path, "int3")
    assert "int3" in one_line(error)
    assert "bfloat16" in str(error.value)


def test_no_prompts(model):
    with pytest.raises(InputError) as error:
        model.generate([])
    assert "no prompts" in one_line(error)


def test_an_empty_prompt_without_a_bos_rule(model):
    class NoBos:
        encode = staticmethod(lambda text, **_: model.tokenizer.encode(text, add_bos=False))

    with pytest.raises(InputError) as error:
        lj.Model(model.config, model.params, NoBos(), model.path).generate("")
    assert "empty" in one_line(error)


@pytest.mark.parametrize(
    ("setting", "value"), [("temperature", -0.5), ("top_p", 0.0), ("top_p", 1.5), ("max_new_tokens", 0)]
)
def test_settings_out_of_range(model, setting, value):
    with pytest.raises(InputError) as error:
        model.generate("ab", **{setting: value})
    assert setting in one_line(error)
    assert str(value) in str(error.value)


@pytest.mark.parametrize("seed", [1 << 63, -(1 << 70), 1.5, "one"])
def test_a_seed_must_be_a_64_bit_integer(model, seed):
    with pytest.raises(InputError, match="seed is") as error:
        model.generate("a", max_new_tokens=2, seed=seed)
    assert "\n" not in str(error.value)


def test_numpy_numbers_are_seeds_too(model):
    settings = {"max_new_tokens": 4, "temperature": 1.0}
    assert model.generate("a", seed=np.int64(7), **settings) == model.generate("a", seed=7, **settings)


def test_token_ids_out_of_range(model):
    with pytest.raises(InputError, match="1099511627776"):
        list(model.stream_tokens([1, 1 << 40], lj.Sampling(), max_new_tokens=2))


def test_max_new_tokens_over_the_context(model):
    with pytest.raises(InputError) as error:
        model.generate("ab", max_new_tokens=1000)
    assert "32" in one_line(error)
