"""Generation on a mesh with `context`, which divides the cache: the results of one device, in its memory.

Beam search, speculative decoding, sessions and the command line on such meshes are tested beside their other
tests.
"""

from __future__ import annotations

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import kv_cache as kv
from llama_jax import meshes
from llama_jax.decoding import generation
from llama_jax.decoding.state import prefill_cache
from llama_jax.model import forward_cached
from tests.decoding.compiled import loop_body
from tests.optimized import optimized
from tests.random_models import SMALL, random_model, random_prompts

CONFIG, STACKED = random_model(0, SMALL.replace(num_hidden_layers=2))
PARAMS = lj.unstack(jax.device_get(STACKED))  # in numpy, parts are cut for a mesh without compiling programs
TOKENS, LENGTHS = random_prompts(0, CONFIG, [3, 40, 1, 97])
KEYS = jax.random.split(jax.random.key(0), 4)
GREEDY = lj.Sampling(temperature=0.0)
LONG = 1 << 17
only_if_asked = pytest.mark.skipif(
    "TEST_LONG_PROMPT" not in os.environ, reason="takes minutes; set TEST_LONG_PROMPT=1"
)
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_greedy_rows_of_any_length_are_those_of_one_device(dtype):
    """With a cache of 8 bits; in the parameters' dtype it is below."""
    given = {"key": KEYS, "sampling": GREEDY, "max_new_tokens": 20, "cache_dtype": dtype}
    expected = jax.device_get(lj.generate(CONFIG, PARAMS, TOKENS, LENGTHS, **given))
    mesh = meshes.make_mesh("context=8")
    with jax.set_mesh(mesh):
        params = lj.shard_params(PARAMS, mesh, CONFIG)
        out = jax.device_get(lj.generate(CONFIG, params, TOKENS, LENGTHS, **given))
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-2)


@pytest.mark.slow
def test_inside_jit_a_cache_that_context_does_not_divide_is_rounded_up():
    """97 prompt tokens and 20 new ones are 117 slots, and 4 devices have 30 each."""
    settings = {"max_new_tokens": 20, "num_return_sequences": 2, "top_logprobs": 2}
    go = jax.jit(lambda params: lj.generate(CONFIG, params, TOKENS, LENGTHS, KEYS[0], GREEDY, **settings))
    mesh = meshes.make_mesh("context=4,tensor=2")
    with jax.set_mesh(mesh):
        out = go(lj.shard_params(PARAMS, mesh, CONFIG))
    expected = go(PARAMS)
    for found, wanted in ((out.tokens, expected.tokens), (out.top_tokens, expected.top_tokens)):
        np.testing.assert_array_equal(found, wanted)
    for found, wanted in ((out.logprobs, expected.logprobs), (out.top_logprobs, expected.top_logprobs)):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


HEADS, WIDTH = CONFIG.num_key_value_heads, CONFIG.head_dim
SHARD, CACHE = (f"f32[4,{HEADS},{slots},{WIDTH}]" for slots in (768, 3072))


@pytest.fixture(scope="module")
def lowered():
    """`generate`'s two programs for 3072 slots on four devices: prompts in chunks of 1024, and decoding."""
    mesh = meshes.make_mesh("context=4", devices=jax.devices()[:4])
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    request = int32(4, 3072), int32(4), int32(), KEYS, GREEDY.broadcast(4), int32(8), int32()
    static = {"num_return_sequences": 1, "top_logprobs": 0, "cache_dtype": None}
    with jax.set_mesh(mesh):
        params = lj.shard_params(PARAMS, mesh, CONFIG)
        prefill = generation._prefill_bucketed.lower(CONFIG, params, *request, **static)
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), prefill.out_info
        )
        return prefill, generation.decode_program("cpu").lower(CONFIG, params, state, np.int32(12))


def collectives(text):
    return re.findall(rf"= (\w+\[[\d,]*\])\S* ({COLLECTIVES})(?:-start)?\(", text)


def test_a_device_holds_its_share_of_the_cache(lowered):
    for leaf in jax.tree.leaves(lowered[0].out_info.cache):
        assert leaf.shape == (4, HEADS, 3072, WIDTH)
        assert leaf.sharding.shard_shape(leaf.shape) == (4, HEADS, 768, WIDTH)


def test_a_step_exchanges_maxima_and_sums_and_copies_no_cache(lowered):
    body, group = loop_body(optimized(lowered[1]).as_text()), CONFIG.num_attention_heads // HEADS
    assert SHARD in body and CACHE not in body
    assert not re.findall(rf"= {re.escape(SHARD)}\S* (?:copy|transpose|convert)\(", body)
    shapes = [f"f32[4,{HEADS},{group},1,{WIDTH + 1}]", f"f32[4,{HEADS},{group},1]"]
    merged = [(shape, "all-reduce") for shape in shapes] * CONFIG.num_hidden_layers
    # `context` divides the embedding table's columns too.
    row = (f"f32[4,1,{CONFIG.hidden_size}]", "all-gather")
    assert sorted(collectives(body)) == sorted([*merged, row])


def test_a_prompt_moves_chunks_and_never_the_cache(lowered):
    text = optimized(lowered[0]).as_text()
    assert SHARD in text and CACHE not in text
    found = collectives(text)
    assert {kind for _, kind in found} >= {"all-gather", "reduce-scatter"}
    assert not [shape for shape, _ in found if re.search(r"\b(3072|768)\b", shape)]


@pytest.mark.slow
@pytest.mark.parametrize("run", [512, pytest.param(LONG, marks=only_if_asked)])
def test_a_prompt_of_131072_tokens_over_eight_devices(run):
    """Its last tokens, after a cache that holds the others; or all of them."""
    config, params = random_model(
        3, SMALL.replace(num_attention_heads=1, num_key_value_heads=1, hidden_size=64, num_hidden_layers=2,
                         max_position_embeddings=LONG, rope_theta=1e6, rope_scaling=None),
    )  # fmt: skip
    params, rng = lj.unstack(jax.device_get(params)), np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (1, LONG)).astype(np.int32)
    written = rng.normal(size=(1, 1, LONG - run, config.head_dim)).astype(np.float32)

    @jax.jit
    def last_logits(params, tokens, written):
        cache = kv.init_cache(config, 1, LONG, jnp.float32)
        if run < LONG:
            cache = jax.tree.map(lambda layer: kv.write(layer, written, jnp.zeros(1, jnp.int32)), cache)
        cache = prefill_cache(config, params, cache, tokens, LONG - run, LONG - 1)
        return forward_cached(config, params, tokens[:, -1:], jnp.array([LONG - 1]), cache)

    mesh = meshes.make_mesh("context=8")
    with jax.set_mesh(mesh):
        logits, cache = last_logits(lj.shard_params(params, mesh, config), tokens, written)
    assert {shard.data.shape[2] for shard in cache.k[0].addressable_shards} == {LONG // 8}
    expected, plain = last_logits(params, tokens, written)
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    for found, one in zip(cache.v, plain.v, strict=True):
        in_order = np.asarray(found).reshape(1, 1, 8, -1, config.head_dim).swapaxes(2, 3).reshape(one.shape)
        np.testing.assert_allclose(in_order, one, atol=1e-3)
