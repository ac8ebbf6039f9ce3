"""A cache that `context` divides: every write and every read gives what one array on one device gives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import kv_cache as kv
from llama_jax import meshes
from llama_jax.attention import AttentionMask, cached_attention
from llama_jax.ops import striped_cache
from tests.random_models import SMALL

B, K, G, H, S = 2, 2, 2, 8, 48
CONFIG = SMALL.replace(num_key_value_heads=K, num_attention_heads=K * G, head_dim=H, num_hidden_layers=1)


def in_slot_order(array: jax.Array, shards: int) -> np.ndarray:
    """[B, K, S, ...] of a cache over `shards` devices."""
    values = np.asarray(array)
    parts = values.reshape(*values.shape[:2], shards, -1, *values.shape[3:])
    return np.swapaxes(parts, 2, 3).reshape(values.shape)


def values(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnames=("dtype",))
def write_all(dtype: str, new: tuple[jax.Array, ...], starts: tuple[jax.Array, ...]) -> kv.Layer:
    cache = kv.init_cache(CONFIG, B, S, dtype).k[0]
    for keys, start in zip(new, starts, strict=True):
        cache = kv.write(cache, keys, start)
    return cache


WRITES = [("context=8", "float32"), ("fsdp=2,context=2,tensor=2", "int8"), ("context=4,tensor=2", "fp8")]


@pytest.mark.parametrize(("spec", "dtype"), WRITES)
def test_writes_of_any_length_at_any_slot(spec: str, dtype: str) -> None:
    """A token, fewer and more of them than devices, whole stripes; from other slots in each row."""
    new = tuple(values(B, K, length, H) for length in (1, 5, 16, 19, 1, 3))
    starts = tuple(jnp.array(start) for start in ([0, 9], [3, 43], [8, 32], [29, 5], [47, 46], [45, 1]))
    expected = write_all(dtype, new, starts)
    mesh = meshes.make_mesh(spec)
    with jax.set_mesh(mesh):
        found = write_all(dtype, new, starts)
    for one, two in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert two.sharding.shard_shape(two.shape)[2] == S // mesh.shape["context"]
        np.testing.assert_array_equal(one, in_slot_order(two, mesh.shape["context"]))


def test_a_row_without_tokens_is_not_written() -> None:
    """Rows that are added to a batch decode at slot -1."""
    with jax.set_mesh(meshes.make_mesh("context=8")):
        cache = write_all("float32", (values(B, K, 1, H),), (jnp.array([-1, 3]),))
    first, second = np.asarray(cache)
    assert not first.any() and second.any()


def test_a_cache_is_rounded_up_and_grows() -> None:
    expected = write_all("float32", (values(B, K, 19, H),), (jnp.array([5, 23]),))
    with jax.set_mesh(meshes.make_mesh("context=4,tensor=2")):
        assert kv.init_cache(CONFIG, B, 45, jnp.float32).length == S
        cache = write_all("float32", (values(B, K, 19, H),), (jnp.array([5, 23]),))
        grown = jax.jit(lambda x: striped_cache.grow(x, 64))(cache)
    found = in_slot_order(grown, 4)
    np.testing.assert_array_equal(found[:, :, :S], expected)
    assert not found[:, :, S:].any()


@functools.partial(jax.jit, static_argnames=("dtype", "block_size"))
def attend(
    dtype: str, block_size: int, q: jax.Array, start: jax.Array, prefix: object, allowed: jax.Array | None
) -> jax.Array:
    """Of T queries, which end the rows, to a cache whose first slots are written."""
    keys, zero = values(B, K, S - 8, H), (jnp.zeros(B, jnp.int32),)
    k, v = (write_all(dtype, (x,), zero) for x in (keys, jnp.flip(keys)))
    order = start[:, None] + jnp.arange(q.shape[1])
    mask = AttentionMask(order, jnp.broadcast_to(jnp.arange(S), (B, S)), allowed=allowed)
    used = None if q.shape[1] < 8 else start.max() + q.shape[1]
    return cached_attention(q, k, v, mask, prefix, used=used, block_size=block_size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "length", "dtype", "extra"),
    [
        ("context=8", 1, "float32", "prefix"),
        ("context=8", 16, "float32", "prefix"),
        ("data=2,context=2,tensor=2", 3, "int8", "allowed"),
        ("fsdp=2,context=4", 16, "int8", ""),
        ("fsdp=2,context=4", 1, "fp8", ""),
    ],
)
def test_attention_equals_that_of_one_device(spec: str, length: int, dtype: str, extra: str) -> None:
    """Also of a query with a single key, which only one device has, and of one with none."""
    q, start = values(B, length, K * G, H), jnp.array([0, 22])
    prefix = {name: values(K, 3, H) for name in "kv"} if extra == "prefix" else None
    some = jnp.asarray(np.random.default_rng(0).random((B, length, S)) < 0.3)
    allowed = some if extra == "allowed" else None
    expected = attend(dtype, 8, q, start, prefix, allowed)
    with jax.set_mesh(meshes.make_mesh(spec)):
        found = attend(dtype, 4, q, start, prefix, allowed)
        np.testing.assert_allclose(found, expected, atol=2e-6)
        if extra == "":
            assert np.isfinite(attend(dtype, 4, q, jnp.array([-length, 0]), prefix, allowed)).all()
