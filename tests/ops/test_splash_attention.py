"""Splash attention in interpret mode equals the xla backend, on one device and on meshes."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib

from llama_jax import meshes, sharding
from llama_jax.attention import AttentionMask, attention
from llama_jax.errors import ConfigError
from llama_jax.ops import splash_forward, splash_gradient, splash_tiles
from llama_jax.ops.splash_attention import RESIDUALS, splash_attention
from llama_jax.ops.splash_forward import attention_forward


def inputs(*, batch=2, length=256, heads=4, kv_heads=2, head_dim=64, dtype=jnp.float32):
    """q, k, v, and the weights of the output in a scalar loss; from numpy, which compiles nothing."""
    shapes = [(batch, length, heads, head_dim)] + [(batch, kv_heads, length, head_dim)] * 2
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in (*shapes, shapes[0])]


def thirds(batch, length):
    """Segments of unequal lengths, different in each row."""
    at = np.arange(length, dtype=np.int32)
    return np.stack(
        [(at >= length // 3).astype(np.int32) + (at >= length // 2 + 7 * b) for b in range(batch)]
    )


def value_and_gradients(attend, q, k, v, coeffs):
    def scalar(q, k, v):
        out = attend(q, k, v)
        return (out.astype(jnp.float32) * coeffs.astype(jnp.float32)).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(array, np.float32) for array in (out, *gradients)]


def expected(q, k, v, coeffs, segments):
    """The xla backend on the same values in f32."""
    at = np.broadcast_to(np.arange(q.shape[1]), q.shape[:2])
    mask = AttentionMask(at, at, segments, segments)
    q, k, v = (array.astype(np.float32) for array in (q, k, v))
    return value_and_gradients(lambda *qkv: attention(*qkv, mask), q, k, v, coeffs)


@pytest.mark.parametrize(("kv_heads", "segmented"), [(1, True), (2, False), (4, True)])
def test_equals_xla_in_value_and_gradient(kv_heads, segmented):
    q, k, v, coeffs = inputs(kv_heads=kv_heads)
    segments = thirds(2, 256) if segmented else None
    found = value_and_gradients(
        lambda *qkv: splash_attention(*qkv, segments, interpret=True), q, k, v, coeffs
    )
    for ours, theirs in zip(found, expected(q, k, v, coeffs, segments), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_bf16_stays_within_its_rounding():
    """With wider heads than the other tests."""
    q, k, v, coeffs = inputs(length=128, head_dim=128, dtype=jnp.bfloat16)
    segments = thirds(2, 128)
    found = value_and_gradients(
        lambda *qkv: splash_attention(*qkv, segments, interpret=True), q, k, v, coeffs
    )
    for ours, theirs in zip(found, expected(q, k, v, coeffs, segments), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2**-7 * np.abs(theirs).max())


@pytest.mark.parametrize("length", [5, 130])
def test_other_lengths_are_padded_to_a_multiple_of_128(length):
    q, k, v, coeffs = inputs(length=length)
    segments = thirds(2, length)
    found = value_and_gradients(
        lambda *qkv: splash_attention(*qkv, segments, interpret=True), q, k, v, coeffs
    )
    for ours, theirs in zip(found, expected(q, k, v, coeffs, segments), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2"])
def test_meshes_equal_one_device(mesh):
    """Batch rows and heads are sharded; over `context`, every device computes the same."""
    arrays = inputs(batch=4, length=256)
    segments = thirds(4, 256)
    wanted = expected(*arrays, segments)
    with jax.set_mesh(meshes.make_mesh(mesh)):
        rows = [sharding.ACT_BTNH, sharding.CACHE_BKSH, sharding.CACHE_BKSH, sharding.ACT_BTNH]
        both = zip([*arrays, segments], [*rows, sharding.TOKENS_BT], strict=True)
        *laid, split = (
            jax.device_put(array, sharding.named(jax.sharding.get_mesh(), s)) for array, s in both
        )
        found = value_and_gradients(lambda *qkv: splash_attention(*qkv, split, interpret=True), *laid)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_saved_residuals_are_not_recomputed():
    q, k, v, _ = inputs(length=128)

    def computed(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        attend = jax.checkpoint(lambda q: splash_attention(q, k, v, interpret=True).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(attend))(q)).count(f"name[name={RESIDUALS}]")

    assert computed(RESIDUALS) == 2  # the output and its log-sum-exp
    assert computed() > 2


def test_keys_that_do_not_fit_at_once(monkeypatch):
    """Keys and their gradients stay in VMEM: of more of them there is a kernel for each part of the row."""
    *qkv, coeffs = inputs(length=384)  # three tiles, 256 and 128 keys
    segments = thirds(2, 384)

    def attend(*qkv):
        return splash_attention(*qkv, segments, interpret=True)

    def kernels():
        return str(jax.make_jaxpr(jax.grad(lambda q: attend(q, *qkv[1:]).sum()))(qkv[0])).count(
            "pallas_call["
        )

    assert kernels() == 2
    for module in (splash_forward, splash_gradient):
        monkeypatch.setattr(module, "MAX_KEYS", 256)
    assert kernels() == 4
    found = value_and_gradients(attend, *qkv, coeffs)
    for ours, theirs in zip(found, expected(*qkv, coeffs, segments), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_fewer_keys_fit_into_the_memory_of_v4(monkeypatch):
    """As the mesh says that the program is for; heads of 256 take twice as much."""
    keys, wide = (jax.ShapeDtypeStruct((1, 1, 8192, size), jnp.bfloat16) for size in (64, 256))
    assert [splash_tiles.columns(k, 8192, 4096) for k in (keys, wide)] == [1, 2]
    device = types.SimpleNamespace(device_kind="TPU v4")
    mesh = types.SimpleNamespace(abstract_device=device)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert [splash_tiles.columns(k, 8192, 4096) for k in (keys, wide)] == [2, 4]


@pytest.mark.parametrize(("causal", "head_dim"), [(True, 128), (False, 64)])
def test_equals_jaxs_kernels(causal, head_dim):
    """Value and gradients, with groups of heads and segments; also of keys that a ring sends."""
    q, k, v, coeffs = inputs(length=256, head_dim=head_dim)
    ids = thirds(2, 256)
    kernel = kernel_lib.make_splash_mqa(
        mask_lib.MultiHeadMask([(mask_lib.CausalMask if causal else mask_lib.FullMask)((256, 256))] * 2),
        block_sizes=kernel_lib.BlockSizes(
            block_q=256, block_kv=256, block_q_dkv=256, block_kv_dkv=256, block_q_dq=256, block_kv_dq=256
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=True,
    )

    def group(q, k, v, ids):
        return kernel(q, k, v, kernel_lib.SegmentIds(ids, ids))

    def theirs(q, k, v):
        row = jax.vmap(group, in_axes=(0, 0, 0, None))
        grouped = q.swapaxes(1, 2).reshape(2, 2, 2, 256, head_dim) / head_dim**0.5
        return jax.vmap(row)(grouped, k, v, ids).reshape(2, 4, 256, head_dim).swapaxes(1, 2)

    options = {"causal": causal, "interpret": True}
    out, log_sum_exp = attention_forward(q, k, v, ids, ids, **options)
    found = splash_gradient.attention_gradients(q, k, v, ids, ids, out, log_sum_exp, coeffs, **options)
    wanted = value_and_gradients(theirs, q, k, v, coeffs)
    for ours, reference in zip((out, *found), wanted, strict=True):
        np.testing.assert_allclose(ours, reference, atol=2e-5)


def test_invalid_arguments_are_errors():
    q, k, v, _ = inputs(length=128)
    with pytest.raises(
        ConfigError, match="as many keys as queries and got 128 and 64; use the xla or blockwise"
    ):
        splash_attention(q[:, :64], k, v, interpret=True)
    message = r"4 query and 2 key/value heads do not divide .* size 8"
    with jax.set_mesh(meshes.make_mesh("tensor=8")), pytest.raises(ConfigError, match=message):
        splash_attention(q, k, v, interpret=True)
