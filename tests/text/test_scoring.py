"""`Model.logits`, `logprobs` and `embed`: of ragged texts, what each gives alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import inspection
from llama_jax.errors import InputError

TEXTS = ["Once upon a time", "The cat sat on the mat, and then it went home to sleep.", "A"]


@pytest.fixture(scope="module")
def model(shared_data) -> lj.Model:
    return lj.load(shared_data / "stories260K" / "stories260K.bin")


def test_logits_are_those_of_the_tokens(model):
    ids = jnp.array([model.encode_prompt(TEXTS[1])])
    np.testing.assert_allclose(
        model.logits(TEXTS[1]), lj.forward(model.config, model.params, ids)[0], atol=1e-5
    )


def test_log_probabilities_of_ragged_texts_are_those_of_each_alone(model):
    records = model.logprobs(TEXTS, batch_size=2)
    assert [record["text"] for record in records] == sorted(record["text"] for record in records)
    for number, text in enumerate(TEXTS):
        own = [record for record in records if record["text"] == number]
        ids = model.encode_prompt(text)
        assert [record["id"] for record in own] == ids
        assert [record["position"] for record in own] == list(range(len(ids)))
        assert own[0]["logprob"] is None and own[0]["piece"] == model.tokenizer.piece(ids[0])
        logs = jax.nn.log_softmax(model.logits(text))
        for place in range(1, len(ids)):
            assert own[place]["logprob"] == pytest.approx(float(logs[place - 1, ids[place]]), abs=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_the_pooled_residual_stream_of_each_text(model, pooling):
    embedded = model.embed(TEXTS, layer=2, pooling=pooling, batch_size=2)
    assert embedded.shape == (3, model.config.hidden_size) and embedded.dtype == np.float32
    for row, text in zip(embedded, TEXTS, strict=True):
        ids = jnp.array([model.encode_prompt(text)])
        site = "block.residual_post"
        _, found = lj.capture(model.config, model.params, ids, sites=[site], layers=[2])
        stream = np.asarray(found[site][0, 0])
        np.testing.assert_allclose(row, stream.mean(0) if pooling == "mean" else stream[-1], atol=1e-4)


def test_an_edited_model_says_something_else_and_the_model_itself_the_same(model):
    vector = 4 * jax.random.normal(jax.random.key(0), (model.config.hidden_size,))
    edited = model.with_edit(inspection.steer(vector, layers=[1, 2]))
    before = model.generate(TEXTS[0], max_new_tokens=8)
    assert edited.generate(TEXTS[0], max_new_tokens=8) != before
    assert (
        model.generate(TEXTS[0], max_new_tokens=8)
        == before
        == model.with_edit(None).generate(TEXTS[0], max_new_tokens=8)
    )
    assert np.abs(edited.embed(TEXTS) - model.embed(TEXTS)).max() > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logprobs("a text"), "texts is not a list of texts"),
        (lambda m: m.embed([]), "texts is not a list of texts"),
        (lambda m: m.logprobs(["a", "word " * 600]), "text 1 has"),
        (lambda m: m.embed(["a"], pooling="max"), "pooling is 'max'; it must be one of mean, last"),
        (lambda m: m.embed(["a"], layer=5), "layer 5 is not one of the 5 layers"),
        (lambda m: m.embed(["a"], batch_size=0), "batch_size"),
    ],
)
def test_bad_input_is_named(model, call, message):
    with pytest.raises(InputError) as error:
        call(model)
    assert message in str(error.value)
