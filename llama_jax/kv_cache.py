"""The key/value cache of decoding: allocated once, written in place, read whole.

Slot s of a row holds the key and value of the token at position s, so a row that is shorter than its
batch mates simply has unwritten slots, which the causal mask never reaches. Layers are separate arrays:
slicing one stacked array would copy it at every token.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from llama_jax import sharding
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.ops.layouts import write_slices

CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Int8:
    """Keys or values of one layer, rounded to 8 bits with one scale for each head's vector.

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
      k: tuple of L arrays [B, K, S, H], or of `Int8`; head-major, several times faster to attend over on
        a CPU than [B, S, K, H].
      v: likewise.
    """

    k: tuple[Layer, ...]
    v: tuple[Layer, ...]

    @property
    def length(self) -> int:
        """S, the number of positions it can hold."""
        return jax.tree.leaves(self.k)[0].shape[2]


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: jax.typing.DTypeLike) -> KVCache:
    """An empty cache for `batch` rows of up to `length` positions, laid out over the current mesh.

    A batch that the mesh's batch axes do not divide is replicated.

    Args:
      config: the model.
      batch: rows.
      length: S.
      dtype: of what it holds: float32, bfloat16, float16 or int8, which halves bfloat16's bytes.

    Raises:
      InputError: for another dtype.
    """
    dtype = checked_dtype(dtype)
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    spec = sharding.out_sharding(sharding.CACHE_BKSH, shape)

    def zeros() -> tuple[Layer, ...]:
        return tuple(_empty(shape, dtype, spec) for _ in range(config.num_hidden_layers))

    return KVCache(k=zeros(), v=zeros())


def checked_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """`dtype` as one that a cache can have.

    Raises:
      InputError: if it is another.
    """
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.name not in CACHE_DTYPES:
        raise InputError(f"cache_dtype is {dtype!r}; it must be one of {', '.join(CACHE_DTYPES)}")
    return known


def dtype_name(dtype: jax.typing.DTypeLike | None) -> str | None:
    """`checked_dtype`'s name, as a static argument; None for None, which is the parameters' dtype."""
    return None if dtype is None else checked_dtype(dtype).name


def _empty(shape: tuple[int, ...], dtype: jnp.dtype, spec: jax.sharding.PartitionSpec | None) -> Layer:
    values = jnp.zeros(shape, dtype, out_sharding=spec)
    return (
        Int8(values=values, scale=jnp.zeros_like(values[..., 0], jnp.float32))
        if dtype == jnp.int8
        else values
    )


def write(cache: Layer, new: jax.Array, start: jax.Array) -> Layer:
    """Writes T positions of one layer's keys or values, each row from its own position on.

    Args:
      cache: [B, K, S, H], or `Int8`.
      new: [B, K, T, H].
      start: int [B], the slot of each row's first new position; start + T must not pass S, since the
        update would then slide back over earlier slots. Callers check it where they know it.

    Returns:
      The updated layer; in place where XLA can donate the buffer.
    """
    if not isinstance(cache, Int8):
        return write_slices(cache, new.astype(cache.dtype), start)
    new = new.astype(jnp.float32)
    scale = jnp.max(jnp.abs(new), axis=-1) / 127
    values = jnp.round(new / jnp.where(scale > 0, scale, 1.0)[..., None]).astype(jnp.int8)
    return Int8(
        values=write_slices(cache.values, values, start), scale=write_slices(cache.scale, scale, start)
    )
