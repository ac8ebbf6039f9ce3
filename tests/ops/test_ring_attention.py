"""Ring attention over `context` equals plain attention, in values and gradients, on 8 simulated devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import meshes, sharding
from llama_jax.attention import attention
from llama_jax.errors import ConfigError
from llama_jax.ops import zigzag
from llama_jax.ops.ring_attention import RESIDUALS, ring_attention
from tests.test_attention import causal, inputs


def value_and_gradients(attend, q, k, v, weights):
    """Output and gradients of a weighted sum of it."""

    def total(q, k, v):
        out = attend(q, k, v)
        return (out.astype(jnp.float32) * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


def in_ring(mesh, arguments, weights, segments, **options):
    """The same by ring attention on a mesh; arguments and results in the order of the row."""

    def attend(q, k, v):
        ids = zigzag.enter(sharding.constrain(segments, sharding.TOKENS_BT)) if segments is not None else None
        rows = [sharding.constrain(x, sharding.ACT_BTNH) for x in (q, k.swapaxes(1, 2), v.swapaxes(1, 2))]
        q, k, v = zigzag.enter(rows)
        return zigzag.leave(ring_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), ids, **options))

    with jax.set_mesh(meshes.make_mesh(mesh, devices=jax.devices()[: options.pop("devices", 8)])):
        return value_and_gradients(attend, *arguments, weights)


def packed(batch, length):
    """Segments of unequal lengths, different in each row, some within a chunk and some across many."""
    ends = np.random.default_rng(0).integers(0, length, (batch, 3))
    return (np.arange(length) >= ends[:, :, None]).sum(1).astype(np.int32)


def weights_of(shape):
    """Of the output in a scalar loss; from numpy, which compiles nothing."""
    return np.random.default_rng(6).standard_normal(shape, np.float32)


@pytest.mark.parametrize(
    ("mesh", "segmented"),
    [("fsdp=2,context=2,tensor=2", True), ("fsdp=2,context=4", False), ("context=8", True)],
)
def test_equals_plain_attention(mesh, segmented):
    batch, length = 2, 48
    arguments = inputs(0, batch=batch, length=length, heads=4, kv_heads=2)
    segments = packed(batch, length) if segmented else None
    weights = weights_of(arguments[0].shape)
    expected = value_and_gradients(
        lambda *qkv: attention(*qkv, causal(batch, length, segments)), *arguments, weights
    )
    found = in_ring(mesh, arguments, weights, segments, backend="blockwise")
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_for_tpu_equals_plain_attention(dtype):
    """In interpret mode, with two chunks of 128 on each device; in bf16 within its rounding."""
    devices = 4 if dtype == jnp.float32 else 2
    batch, length = 1, 256 * devices
    arguments = inputs(1, batch=batch, length=length, heads=2, kv_heads=1, head_dim=16)
    segments = packed(batch, length)
    weights = weights_of(arguments[0].shape)
    arguments = [x.astype(dtype) for x in arguments]
    exact = [x.astype(np.float32) for x in arguments]
    expected = value_and_gradients(
        lambda *qkv: attention(*qkv, causal(batch, length, segments)), *exact, weights
    )
    options = {"devices": devices, "backend": "splash", "interpret": True}
    found = in_ring(f"context={devices}", arguments, weights, segments, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        tolerance = 2e-5 if dtype == jnp.float32 else 2**-7 * np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=tolerance)


@pytest.mark.parametrize("count", [2, 8])
def test_zigzag_gives_each_device_a_chunk_from_either_end(count):
    """Contiguous chunks 0..2C-1 become i and 2C-1-i; entering, then leaving, changes nothing."""
    mesh = meshes.make_mesh({"context": count}, devices=jax.devices()[:count])
    rows = np.arange(4 * count).reshape(1, -1)

    @jax.jit
    def there_and_back(rows):
        entered = zigzag.enter(sharding.constrain(rows, sharding.TOKENS_BT))
        return entered, zigzag.leave(entered)

    with jax.set_mesh(mesh):
        entered, back = there_and_back(rows)
    chunks = np.asarray(entered).reshape(count, 2, 2)[:, :, 0] // 2
    np.testing.assert_array_equal(chunks, [[i, 2 * count - 1 - i] for i in range(count)])
    np.testing.assert_array_equal(back, rows)


def test_saved_residuals_are_not_computed_again():
    q, k, v = map(jnp.asarray, inputs(2, batch=1, length=8, heads=2, kv_heads=1))

    def kernels(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        ring = functools.partial(ring_attention, backend="blockwise")
        attend = jax.checkpoint(lambda q: ring(q, k, v).sum(), policy=policy)
        with jax.set_mesh(meshes.make_mesh("context=2", devices=jax.devices()[:2])):
            return str(jax.make_jaxpr(jax.grad(attend))(q)).count("shard_map[")

    assert kernels() == kernels(RESIDUALS) + 1 == 3


def test_lengths_that_the_mesh_does_not_divide_are_named():
    q, k, v = map(jnp.asarray, inputs(3, batch=1, length=12, heads=2, kv_heads=1))
    wanted = {"blockwise": "of 8: 8 or 16$", "splash": "of 1024: 1024$"}
    with jax.set_mesh(meshes.make_mesh("context=4", devices=jax.devices()[:4])):
        for backend, rest in wanted.items():
            message = f"sequences of 12 tokens .* axis context of size 4, which needs a multiple {rest}"
            with pytest.raises(ConfigError, match=message):
                ring_attention(q, k, v, backend=backend)
