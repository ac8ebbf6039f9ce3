"""Sliding-window attention of whole rows: backends, layers of different kinds, packed rows and meshes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax as lj
from llama_jax import attention as attention_module
from llama_jax import meshes, sharding
from llama_jax.adapters import prefix
from llama_jax.attention import AttentionMask
from llama_jax.errors import ConfigError
from llama_jax.ops import tiles
from llama_jax.ops.cudnn_attention import cudnn_attention
from llama_jax.ops.splash_attention import splash_attention
from tests import cuda
from tests.ops.test_splash_attention import inputs as whole_rows
from tests.ops.test_splash_attention import thirds, value_and_gradients
from tests.optimized import optimized
from tests.random_models import SMALL, random_model
from tests.test_attention import causal, inputs, numpy_attention

attention = jax.jit(attention_module.attention, static_argnames=("backend", "block_size", "window"))
ALTERNATING = SMALL.replace(
    num_hidden_layers=4,
    sliding_window=8,
    window_layers=(True, False) * 2,
    rope_layers=(True, True, False, True),
)
TWO = SMALL.replace(num_hidden_layers=2, sliding_window=8, window_layers=(True, False))
CONFIG, PARAMS = random_model(0, ALTERNATING)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 48))


def near(length: int, window: int, segments: np.ndarray | None = None) -> np.ndarray:
    """bool [B or 1, T, T] by the rule of transformers: i - w < j <= i, in a segment."""
    i, j = np.arange(length)[:, None], np.arange(length)
    allowed = (j <= i) & (j > i - window)
    return allowed[None] if segments is None else allowed & (segments[:, :, None] == segments[:, None])


def expected(q, k, v, coeffs, window, segments=None):
    """The xla backend's value and gradients, in f32."""
    mask = causal(len(q), q.shape[1], segments)
    q, k, v = (array.astype(np.float32) for array in (q, k, v))
    return value_and_gradients(lambda *qkv: attention(*qkv, mask, window=window), q, k, v, coeffs)


def assert_same(found, wanted, atol=2e-5):
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
@pytest.mark.parametrize(("window", "kv_heads"), [(1, 3), (5, 1), (12, 6)])
def test_a_query_attends_to_the_last_keys_up_to_its_own(backend, window, kv_heads):
    q, k, v = inputs(0, kv_heads=kv_heads)
    segments = np.array([[0] * 5 + [1] * 8, [3] * 13])
    out = attention(q, k, v, causal(2, 13, segments), backend=backend, block_size=4, window=window)
    np.testing.assert_allclose(out, numpy_attention(q, k, v, near(13, window, segments)), atol=2e-6)


@pytest.mark.parametrize(("length", "block", "window"), [(33, 4, 9), (32, 8, 8), (30, 16, 3), (21, 4, 40)])
def test_blockwise_is_xla_in_value_and_gradient(length, block, window):
    q, k, v = inputs(1, length=length)
    segments = np.cumsum(np.random.default_rng(5).random((2, length)) < 0.1, axis=1)
    coeffs = np.random.default_rng(6).standard_normal(q.shape).astype(np.float32)
    mask = causal(2, length, segments)
    found = value_and_gradients(
        lambda *qkv: attention(*qkv, mask, backend="blockwise", block_size=block, window=window),
        q,
        k,
        v,
        coeffs,
    )
    assert_same(found, expected(q, k, v, coeffs, window, segments), atol=5e-6)


def test_blockwise_with_queries_of_other_positions_in_each_row():
    q, k, v = inputs(3, length=3, keys=20)
    mask = AttentionMask(np.array([[4, 5, 6], [17, 18, 19]]), np.broadcast_to(np.arange(20), (2, 20)))
    out = attention(q, k, v, mask, backend="blockwise", block_size=2, window=4)
    np.testing.assert_allclose(out, attention(q, k, v, mask, window=4), atol=2e-6)


def test_blockwise_passes_over_a_number_of_tiles_that_is_linear_in_the_length():
    """Tiles of 4 and a window of 8: at most three for each block of queries, and of keys."""

    def count(length: int) -> int:
        at = jnp.arange(length).reshape(-1, 1, 4)
        of_queries = [tiles.near(8, block[None], at) for block in at]
        of_keys = [tiles.near(8, at, block[None]) for block in at]
        counts = [[int(end - first) for first, end in side] for side in (of_queries, of_keys)]
        assert sum(counts[0]) == sum(counts[1])
        assert max(counts[0]) == max(counts[1]) == 3
        return sum(counts[0])

    assert (count(40), count(80)) == (27, 57)
    q, k, v = inputs(4, length=30)
    k[:, :, :10] = np.nan  # not read by queries after them, nor by their gradients
    weight = np.arange(30)[None, :, None, None] >= 20

    def total(q, k, v):
        out = attention(q, k, v, causal(2, 30), backend="blockwise", block_size=4, window=5)
        return jnp.where(weight, out, 0).sum()

    value, grads = jax.value_and_grad(total, (0, 1, 2))(q, k, v)
    assert np.isfinite(value) and all(np.isfinite(grad[:, 20:]).all() for grad in grads[:1])


@pytest.mark.parametrize(
    ("window", "kv_heads", "length", "segmented"),
    [(100, 2, 380, True), (1, 2, 384, False), (128, 1, 640, False), (300, 4, 640, True)],
)
def test_splash_is_xla_in_value_and_gradient(window, kv_heads, length, segmented):
    """In 3 and in 5 tiles of queries, which windows read in part."""
    q, k, v, coeffs = whole_rows(batch=1, length=length, kv_heads=kv_heads, head_dim=16)
    segments = thirds(1, length) if segmented else None
    found = value_and_gradients(
        lambda *qkv: splash_attention(*qkv, segments, window=window, interpret=True), q, k, v, coeffs
    )
    assert_same(found, expected(q, k, v, coeffs, window, segments))


@pytest.mark.parametrize("mesh", ["fsdp=2,context=2,tensor=2", "context=8"])
def test_splash_over_a_mesh_is_xla(mesh):
    arrays = whole_rows(batch=2, length=1024, head_dim=16)
    segments, window = thirds(2, 1024), 200
    wanted = expected(*arrays, window, segments)
    with jax.set_mesh(meshes.make_mesh(mesh)):
        rows = [sharding.ACT_BTNH, sharding.CACHE_BKSH, sharding.CACHE_BKSH, sharding.ACT_BTNH]
        laid = [sharding.constrain(array, spec) for array, spec in zip(arrays, rows, strict=True)]
        split = sharding.constrain(segments, sharding.TOKENS_BT)
        found = value_and_gradients(
            lambda *qkv: splash_attention(*qkv, split, window=window, interpret=True), *laid
        )
    assert_same(found, wanted)


@pytest.mark.parametrize(("kv_heads", "segmented"), [(1, True), (2, False)])
def test_cudnn_s_call_is_xla_in_value_and_gradient(kv_heads, segmented):
    q, k, v, coeffs = whole_rows(length=40, kv_heads=kv_heads, head_dim=16)
    segments = thirds(2, 40) if segmented else None
    attend = functools.partial(cudnn_attention, segment_ids=segments, window=7, implementation="xla")
    assert_same(value_and_gradients(attend, q, k, v, coeffs), expected(q, k, v, coeffs, 7, segments))


@pytest.mark.parametrize("segmented", [False, True])
def test_cuda_programs_give_cudnn_the_window_or_a_mask(segmented):
    q, k, v, _ = whole_rows(length=48, dtype=jnp.bfloat16)
    segments = thirds(2, 48) if segmented else None

    def total(*qkv):
        return cudnn_attention(*qkv, segments, window=16).astype(jnp.float32).sum()

    text = cuda.lowered(jax.jit(jax.grad(total, (0, 1, 2))), q, k, v)
    assert cuda.attention_calls(text) == (1, 1)
    length = 0 if segmented else 16
    assert text.count(f"sliding_window_length\\22: {length}") == 2
    assert any(shape[-2:] == (48, 48) for shape in cuda.shapes(text)) == segmented


def run(config, params=PARAMS, tokens=TOKENS, **settings):
    return np.asarray(lj.forward(config, params, tokens, **settings))


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_scanned_periods_are_unrolled_layers(backend):
    assert CONFIG.layer_period == 4
    scanned, unrolled = (run(CONFIG, p, attention_backend=backend) for p in (PARAMS, lj.unstack(PARAMS)))
    np.testing.assert_allclose(scanned, unrolled, atol=2e-5)
    full = run(CONFIG.replace(sliding_window=None, window_layers=()))
    np.testing.assert_allclose(scanned[:, :8], full[:, :8], atol=2e-5)
    assert np.abs(scanned[:, 8:] - full[:, 8:]).max() > 0.1


def test_only_layers_with_the_window_have_it():
    """Two layers with a window of 8 reach back 14 positions, and a full layer all."""
    changed = TOKENS.copy()
    changed[:, 0] = (changed[:, 0] + 1) % CONFIG.vocab_size
    both = SMALL.replace(num_hidden_layers=2, sliding_window=8)
    params = random_model(0, both)[1]
    moved = np.abs(run(both, params) - run(both, params, changed)).max((0, 2)) > 0
    assert moved[:15].all() and not moved[15:].any()
    one = both.replace(window_layers=(False, True))
    assert (np.abs(run(one, params) - run(one, params, changed)).max((0, 2)) > 0).all()


def test_packed_documents_are_each_alone():
    lengths = [20, 28]
    segments = np.repeat([0, 1], lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    packed = run(CONFIG, tokens=TOKENS[:1], positions=positions, segment_ids=segments)
    alone = np.concatenate([run(CONFIG, tokens=TOKENS[:1, :20]), run(CONFIG, tokens=TOKENS[:1, 20:])], axis=1)
    np.testing.assert_allclose(packed, alone, atol=2e-5)


@pytest.mark.parametrize("backend", ["xla", "blockwise"])
def test_a_window_as_long_as_the_row_compiles_the_plain_program(backend):
    def text(window):
        config, shape = SMALL.replace(sliding_window=window), jax.ShapeDtypeStruct((2, 48), jnp.int32)
        options = lj.ForwardOptions(attention_backend=backend)

        def loss(params, tokens):
            return lj.next_token_loss(config, params, tokens, options=options).mean

        return jax.jit(jax.grad(loss)).lower(random_model(0, SMALL)[1], shape).as_text()

    assert text(48) == text(1000) == text(None) != text(47)


@pytest.mark.parametrize(
    ("backend", "mesh"), [("xla", "fsdp=4,tensor=2"), ("blockwise", "fsdp=2,context=2,tensor=2")]
)
def test_a_mesh_gives_the_loss_and_gradient_of_one_device(mesh, backend):
    options = lj.ForwardOptions(attention_backend=backend, custom_vjp=True, remat="attention")
    config, params = random_model(1, TWO)
    tokens = np.tile(TOKENS, (2, 1))
    segments = np.repeat([[0] * 20 + [1] * 28], 4, axis=0)

    @jax.jit
    def loss(params, tokens, segments):
        return lj.next_token_loss(config, params, tokens, segment_ids=segments, options=options).mean

    wanted = jax.device_get(jax.value_and_grad(loss)(params, tokens, segments))
    mesh = meshes.make_mesh(mesh)
    with jax.set_mesh(mesh):
        laid = lj.shard_params(jax.device_get(params), mesh, config)
        split = [sharding.constrain(x, sharding.TOKENS_BT) for x in (tokens, segments)]
        found = jax.device_get(jax.value_and_grad(loss)(laid, *split))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_blockwise_keeps_no_array_of_all_scores():
    q, k, v = inputs(8, batch=1, length=512, heads=2, kv_heads=1)
    total = lambda *qkv: attention(*qkv, causal(1, 512), backend="blockwise", block_size=64, window=99).sum()  # noqa: E731
    text = optimized(jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v)).as_text()
    assert "64,64]" in text and "512,512]" not in text


def test_ring_attention_takes_no_window():
    assert not attention_module.uses_ring("splash", prefix=False, window=True)
    with pytest.raises(ConfigError, match="ring attention takes no window"):
        attention_module.attention(*inputs(0), causal(2, 13), window=4, backend="splash", ring=True)


@pytest.mark.slow
def test_a_prefix_is_the_positions_before_the_row():
    """It equals its tokens in the input, and the window passes over it, in `forward` and in decoding."""
    config, params = random_model(1, TWO)
    length = 12
    settings, ids = prefix.Prefix(length), np.random.default_rng(1).integers(0, config.vocab_size, length)
    adapter = prefix.init(settings, config, params, jax.random.key(0), ids)
    attached = prefix.attach(settings, params, adapter)
    prepended = np.concatenate([np.tile(ids, (2, 1)), TOKENS], axis=1)
    wanted = run(config, params, prepended)[:, length:]
    for backend in ("xla", "blockwise"):
        np.testing.assert_allclose(run(config, attached, attention_backend=backend), wanted, atol=5e-5)
    prompts = np.random.default_rng(2).integers(0, config.vocab_size, (2, 300))  # several blocks of slots
    prepended, lengths = np.concatenate([np.tile(ids, (2, 1)), prompts], axis=1), np.array([300, 3], np.int32)
    given = {"key": jax.random.key(0), "sampling": lj.Sampling(temperature=0.0), "max_new_tokens": 4}
    found = lj.generate(config, attached, prompts, lengths, **given)
    plain = lj.generate(config, params, prepended, lengths + length, **given)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    np.testing.assert_allclose(found.logprobs, plain.logprobs, atol=5e-5)
    beams = functools.partial(lj.beam_search, config, num_beams=2, max_new_tokens=4)
    found, plain = beams(attached, prompts, lengths), beams(params, prepended, lengths + length)
    np.testing.assert_array_equal(found.tokens, plain.tokens)
    with pytest.raises(ConfigError, match="a prefix and a sliding window of 8 in packed rows"):
        run(config, attached, segment_ids=np.zeros_like(TOKENS))
