"""The key/value cache of decoding: allocated once and written in place.

Slot s of a batch row holds the key and value of the token at position s. A row that is shorter than others in
the batch has unwritten slots, which the causal mask excludes. Layers are separate arrays: slicing one stacked
array would copy it at every token. On a mesh, `context` divides the slots (`ops.striped_cache`).
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.ops import striped_cache
from llama_jax.ops.layouts import write_slices

CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Int8:
    """Keys or values of one layer, quantized to 8 bits with one scale per vector of a head.

    Attributes:
      values: int8 [B, K, S, H].
      scale: f32 [B, K, S]; a vector is values * scale.
    """

    values: jax.Array
    scale: jax.Array


Layer = jax.Array | Int8


@chex.dataclass(frozen=True, mappable_dataclass=False)
class KVCache:
    """Keys (rotated) and values of every layer.

    Attributes:
      k: tuple of L arrays [B, K, S, H], or of `Int8`. Attention on CPU is several times faster with this
        head-major layout than with [B, S, K, H].
      v: likewise.
    """

    k: tuple[Layer, ...]
    v: tuple[Layer, ...]

    @property
    def length(self) -> int:
        """S, the number of slots."""
        return jax.tree.leaves(self.k)[0].shape[2]


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: jax.typing.DTypeLike) -> KVCache:
    """An empty cache, sharded over the current mesh.

    A batch that the batch axes of the mesh do not divide is replicated. `context` divides the slots.

    Args:
      config: the model.
      batch: B.
      length: S, which is rounded up to a multiple of `context`.
      dtype: float32, bfloat16, float16 or int8, which has half the bytes of bfloat16.

    Raises:
      InputError: for another dtype.
    """
    dtype = checked_dtype(dtype)
    shards = striped_cache.shards()
    shape = (batch, config.num_key_value_heads, -(-length // shards) * shards, config.head_dim)
    spec = sharding.out_sharding(sharding.STRIPED_BKSH if shards > 1 else sharding.CACHE_BKSH, shape)

    def zeros() -> tuple[Layer, ...]:
        return tuple(_empty(shape, dtype, spec) for _ in range(config.num_hidden_layers))

    return KVCache(k=zeros(), v=zeros())


def checked_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """`dtype` as a `jnp.dtype`.

    Raises:
      InputError: if a cache cannot have it.
    """
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.name not in CACHE_DTYPES:
        raise InputError(f"cache_dtype is {dtype!r}; it must be one of {', '.join(CACHE_DTYPES)}")
    return known


def dtype_name(dtype: jax.typing.DTypeLike | None) -> str | None:
    """The name of `checked_dtype`, hashable as a static argument; None, the parameters' dtype, stays None."""
    return None if dtype is None else checked_dtype(dtype).name


def _empty(shape: tuple[int, ...], dtype: jnp.dtype, spec: jax.sharding.PartitionSpec | None) -> Layer:
    values = jnp.zeros(shape, dtype, out_sharding=spec)
    return (
        Int8(values=values, scale=jnp.zeros_like(values[..., 0], jnp.float32))
        if dtype == jnp.int8
        else values
    )


def write(cache: Layer, new: jax.Array, start: jax.Array) -> Layer:
    """Writes the keys or values of T tokens into one layer, each batch row from its own slot on.

    Args:
      cache: [B, K, S, H], or `Int8`.
      new: [B, K, T, H].
      start: int [B], the first slot to write in each row. start + T must be at most S: otherwise XLA clamps
        the start, and earlier slots are overwritten. Callers check it where they know it.

    Returns:
      The updated layer; written in place where XLA can reuse the buffer.
    """
    if isinstance(cache, Int8):
        new = new.astype(jnp.float32)
        scale = jnp.max(jnp.abs(new), axis=-1) / 127
        values = jnp.round(new / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8)
        stored: Layer = Int8(values=values, scale=scale)
    else:
        stored = new.astype(cache.dtype)
    if striped_cache.shards() > 1:
        return striped_cache.write(cache, stored, start)
    return jax.tree.map(lambda slots, new: write_slices(slots, new, start), cache, stored)


def grow(cache: KVCache, length: int) -> KVCache:
    """The cache with `length` slots, the new ones empty; `context` divides the number."""
    return jax.tree.map(lambda x: striped_cache.grow(x, length), cache)
