"""Derived models (pooled heads, averages, resized vocabularies), each against its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax.errors import CheckpointError, ConfigError
from llama_jax.weights import load_params, open_source
from llama_jax.weights.derived import Averaged, PooledHeads, ResizedVocabulary
from llama_jax.weights.names import leaves
from llama_jax.weights.tensors import ParamsTensors
from llama_jax.weights.write.cast import cast
from llama_jax.weights.write.hf import plan_hf
from llama_jax.weights.write.run import write
from llama_jax.weights.write.vocabulary import Vocabulary
from tests.random_models import random_model

BASE = lj.LlamaConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    max_position_embeddings=64,
)
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def host_model(seed, config):
    """With numpy arrays: slices of device arrays would compile a program for each shape."""
    config, params = random_model(seed, config)
    return config, jax.device_get(params)


def params_of(tensors, tmp_path):
    write(plan_hf(tensors, None, Vocabulary()), tensors, tmp_path / "out")
    source = open_source(tmp_path / "out")
    assert source.config == tensors.config
    return load_params(source)


def repeated(params, groups):
    """`params` with each key and value head replaced by the first of its group: [L, D, K, H]."""
    attention = params["layers"]["attention"]
    first = {name: attention[name][:, :, ::groups].repeat(groups, axis=2) for name in ("wk", "wv")}
    return {**params, "layers": {**params["layers"], "attention": {**attention, **first}}}


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_pooling_equal_heads_is_exact(tmp_path, kv_heads):
    config, params = host_model(5, BASE)
    params = repeated(params, 8 // kv_heads)
    tensors = PooledHeads(ParamsTensors(config, params), kv_heads)
    pooled = params_of(tensors, tmp_path)
    pooled = jax.device_get(pooled)
    stored = pooled["layers"]["attention"]["wk"]
    assert np.array_equal(stored, params["layers"]["attention"]["wk"][:, :, :: 8 // kv_heads])
    ours, theirs = lj.forward(tensors.config, pooled, TOKENS), lj.forward(config, params, TOKENS)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [3, 6, 7])
def test_pooling_is_exact_for_any_group_size(groups):
    config, params = host_model(6, BASE.replace(num_attention_heads=groups, num_key_value_heads=groups))
    params = repeated(params, groups)
    tensors = PooledHeads(ParamsTensors(config, params), 1)
    leaf = next(leaf for leaf in leaves(config) if leaf.path[-1] == "wk")
    whole = ParamsTensors(config, params).read(leaf, 0)
    assert np.array_equal(tensors.read(leaf, 0), whole[: config.head_dim])


def test_pooled_heads_are_group_means(tmp_path):
    config, params = host_model(5, BASE)
    pooled = params_of(PooledHeads(ParamsTensors(config, params), 2), tmp_path)
    for name in ("wk", "wv"):
        whole = np.asarray(params["layers"]["attention"][name], np.float64)
        mean = whole.reshape(2, 32, 2, 4, 8).mean(axis=3)
        np.testing.assert_allclose(pooled["layers"]["attention"][name], mean, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kv_heads", [0, 3, 16])
def test_indivisible_kv_heads_are_refused(kv_heads):
    with pytest.raises(ConfigError, match=r"can be pooled to 1, 2, 4, 8$"):
        PooledHeads(ParamsTensors(*host_model(5, BASE)), kv_heads)


def test_average_of_a_model_with_itself(tmp_path):
    config, params = host_model(5, BASE)
    same = ParamsTensors(config, params)
    averaged = params_of(Averaged(same, [same, same, same], [0.25] * 4), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, averaged, params)


def test_average_uses_the_given_weights(tmp_path):
    (config, a), (_, b) = host_model(5, BASE), host_model(6, BASE)
    tensors = Averaged(ParamsTensors(config, a), [ParamsTensors(config, b)], [1.5, -0.5])
    mixed = params_of(tensors, tmp_path)
    close = lambda m, a, b: np.testing.assert_allclose(m, 1.5 * a - 0.5 * b, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, mixed, a, b)


def test_average_of_different_dtypes_is_f32():
    config, params = host_model(5, BASE)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    mixed = Averaged(ParamsTensors(config, params), [ParamsTensors(config, half)], [0.5, 0.5])
    both = Averaged(ParamsTensors(config, half), [ParamsTensors(config, half)], [0.5, 0.5])
    leaf = leaves(config)[0]
    assert mixed.dtype(leaf, None) == mixed.read(leaf, None).dtype == np.float32
    assert both.dtype(leaf, None) == both.read(leaf, None).dtype == jnp.bfloat16


def test_average_that_overflows_its_dtype_is_refused():
    config, params = host_model(5, BASE)
    one, other = (jax.tree.map(lambda x: np.full_like(x, v, np.float16), params) for v in (6e4, -6e4))  # noqa: B023
    mixed = Averaged(ParamsTensors(config, one), [ParamsTensors(config, other)], [1.5, -0.5])
    with pytest.raises(CheckpointError, match="the value 120000 is too large for float16"):
        mixed.read(leaves(config)[0], None)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.4], [0.5, 0.25, 0.25], [float("nan"), 1.0]])
def test_invalid_weights_are_refused(weights):
    same = ParamsTensors(*host_model(5, BASE))
    with pytest.raises(ConfigError, match="give one for each of the 2 models, with a sum of 1"):
        Averaged(same, [same], weights)


def test_models_with_different_configs_are_not_averaged():
    one, other = host_model(5, BASE), host_model(5, BASE.replace(intermediate_size=64, rope_theta=5e5))
    with pytest.raises(ConfigError, match=r"intermediate_size 48 and 64, rope_theta 10000\.0 and 500000\.0"):
        Averaged(ParamsTensors(*one), [ParamsTensors(*other)], [0.5, 0.5])


@pytest.mark.parametrize("tied", [True, False])
def test_appended_vocabulary_rows_are_means(tmp_path, tied):
    config, params = host_model(5, BASE.replace(tie_word_embeddings=tied))
    tensors = ResizedVocabulary(ParamsTensors(config, params), 64)
    larger = jax.device_get(params_of(tensors, tmp_path))
    table = np.asarray(params["embed"]["embedding"], np.float64)
    np.testing.assert_allclose(larger["embed"]["embedding"][60:], [table.mean(0)] * 4, rtol=1e-5, atol=1e-6)
    assert np.array_equal(larger["embed"]["embedding"][:60], params["embed"]["embedding"])
    logits, old = jax.device_get(
        (lj.forward(tensors.config, larger, TOKENS), lj.forward(config, params, TOKENS))
    )
    np.testing.assert_allclose(logits[..., :60], old, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[..., 60], old.mean(-1), rtol=1e-4, atol=1e-4)


def test_truncated_vocabulary(tmp_path):
    config, params = host_model(5, BASE)
    smaller = params_of(ResizedVocabulary(ParamsTensors(config, params), 40), tmp_path)
    assert np.array_equal(smaller["embed"]["embedding"], params["embed"]["embedding"][:40])
    assert np.array_equal(smaller["lm_head"]["kernel"], params["lm_head"]["kernel"][:, :40])


@pytest.mark.parametrize("vocab_size", [0, -1, 520.0, 10**11])
def test_invalid_vocab_sizes_are_refused(vocab_size):
    with pytest.raises(ConfigError, match=r"vocab_size is .*; it must be a whole number from 1 to"):
        ResizedVocabulary(ParamsTensors(*host_model(5, BASE)), vocab_size)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float64"])
def test_casts_match_numpy(name):
    x = np.float32([0, -0.0, 1 / 3, 65504, 1e-7, np.inf, -np.inf, np.nan])
    assert cast(x, jnp.dtype(name)).tobytes() == x.astype(jnp.dtype(name)).tobytes()


def test_float16_overflow_names_the_value(tmp_path):
    config, params = host_model(5, BASE)
    scale = params["final_norm"]["scale"].copy()
    scale[3] = 70000.0
    tensors = ParamsTensors(config, {**params, "final_norm": {"scale": scale}})
    message = "model.norm.weight: the value 70000 is too large for float16; use bfloat16 or float32"
    with pytest.raises(CheckpointError, match=message):
        write(plan_hf(tensors, np.dtype("float16"), Vocabulary()), tensors, tmp_path / "out")
    assert not (tmp_path / "out").exists()
