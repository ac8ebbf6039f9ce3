"""Windows over `context`: neighbors' keys are enough, in values and gradients, and nothing else is sent."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import meshes, sharding
from llama_jax.ops.window_exchange import received_keys, window_attention
from tests.ops.test_splash_attention import inputs, thirds, value_and_gradients
from tests.random_models import SMALL, random_model
from tests.test_window import assert_same, expected

MESHES = ["context=8", "fsdp=2,context=2,tensor=2"]


def laid_out(arrays):
    """q, k, v and coefficients of `inputs`, as layers have them."""
    specs = [sharding.ACT_BTNH, sharding.CACHE_BKSH, sharding.CACHE_BKSH, sharding.ACT_BTNH]
    return [sharding.constrain(array, spec) for array, spec in zip(arrays, specs, strict=True)]


# A window of one key; within a shard of 6 tokens; of just that; and over several.
@pytest.mark.parametrize(
    ("mesh", "window", "segmented"),
    [(MESHES[0], 1, False), (MESHES[0], 7, True), (MESHES[0], 20, True), (MESHES[1], 5, False)],
)
def test_blockwise_is_xla_in_value_and_gradient(mesh, window, segmented):
    arrays = inputs(batch=2, length=48, head_dim=8)
    segments = thirds(2, 48) if segmented else None
    with jax.set_mesh(meshes.make_mesh(mesh)):
        assert received_keys(48, window, "blockwise") == window - 1
        attend = functools.partial(window_attention, window=window, backend="blockwise", block_size=4)
        ids = None if segments is None else sharding.constrain(segments, sharding.TOKENS_BT)
        found = value_and_gradients(lambda *qkv: attend(*qkv, ids), *laid_out(arrays))
    assert_same(found, expected(*arrays, window, segments))


@pytest.mark.parametrize(("window", "received"), [(100, 128), (300, 384)])
def test_splash_is_xla_in_value_and_gradient(window, received):
    """Keys of one neighbor, and of three."""
    arrays, segments = inputs(batch=2, length=1024, head_dim=16), thirds(2, 1024)
    with jax.set_mesh(meshes.make_mesh("context=8")):
        assert received_keys(1024, window, "splash") == received
        attend = functools.partial(window_attention, window=window, backend="splash", interpret=True)
        ids = sharding.constrain(segments, sharding.TOKENS_BT)
        found = value_and_gradients(lambda *qkv: attend(*qkv, ids), *laid_out(arrays))
    assert_same(found, expected(*arrays, window, segments))


def test_where_a_window_reaches_all_others_or_lengths_do_not_divide_keys_are_gathered():
    with jax.set_mesh(meshes.make_mesh(MESHES[1])):
        assert received_keys(48, 24, "blockwise") == 23 and received_keys(48, 25, "blockwise") is None
        assert received_keys(47, 5, "blockwise") is None and received_keys(2 * 100, 5, "splash") is None
    with jax.set_mesh(meshes.make_mesh("context=8")):
        # Mistral 7B v0.1 at 32k: half of a shard's keys more, where 28k would be gathered.
        assert received_keys(32_768, 4096, "splash") == 4096


def test_a_model_with_windows_sends_the_keys_that_they_reach_and_gathers_those_of_full_layers():
    config = SMALL.replace(num_hidden_layers=2, sliding_window=4, window_layers=(True, False))
    params, (batch, length) = random_model(0, config)[1], (2, 48)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length))

    def loss(params, options):
        return lj.next_token_loss(config, params, tokens, options=options).mean

    options = lj.ForwardOptions(attention_backend="blockwise")
    wanted = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, options)
    with jax.set_mesh(mesh := meshes.make_mesh("context=8")):
        run = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        program = run.lower(lj.shard_params(params, mesh, config), options).compile()
        found = program(lj.shard_params(params, mesh, config))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max()), found, wanted)
    pattern = r"= f32\[([\d,]+)\]\S* (collective-permute|all-gather)(?:-start)?\("
    shapes = collections.Counter(re.findall(pattern, program.as_text()))
    heads, size = config.num_key_value_heads, config.head_dim
    # Of the layer with a window keys, values and their gradients; of the full layer keys and values.
    assert shapes[f"{batch},{heads},{config.sliding_window - 1},{size}", "collective-permute"] == 4
    assert shapes[f"{batch},{heads},{length},{size}", "all-gather"] == 2


def test_splash_lowers_for_tpus():
    arrays = [jnp.zeros((2, 2048, 2, 128), jnp.bfloat16), *[jnp.zeros((2, 2, 2048, 128), jnp.bfloat16)] * 2]

    def total(q, k, v):
        rows = [sharding.ACT_BTNH, sharding.CACHE_BKSH, sharding.CACHE_BKSH]
        q, k, v = (sharding.constrain(x, spec) for x, spec in zip((q, k, v), rows, strict=True))
        out = window_attention(q, k, v, window=200, backend="splash")
        return out.astype(jnp.float32).sum()

    with jax.set_mesh(meshes.make_mesh("fsdp=2,context=4")):
        lowered = jax.jit(jax.grad(total, (0, 1, 2))).trace(*arrays).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
