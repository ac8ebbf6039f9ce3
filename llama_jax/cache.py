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


@chex.dataclass(frozen=True, mappable_dataclass=False)
class KVCache:
    """Keys (rotated) and values of every layer.

    Attributes:
      k: tuple of L arrays [B, K, S, H]; head-major, several times faster to attend over on a CPU than
        [B, S, K, H].
      v: likewise.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]

    @property
    def length(self) -> int:
        """S, the number of positions it can hold."""
        return self.k[0].shape[2]


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: jax.typing.DTypeLike) -> KVCache:
    """An empty cache for `batch` rows of up to `length` positions, laid out over the current mesh."""
    shape = (batch, config.num_key_value_heads, length, config.head_dim)
    spec = sharding.out_sharding(sharding.CACHE_BKSH)

    def zeros() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(config.num_hidden_layers))

    return KVCache(k=zeros(), v=zeros())


def write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes T positions of one layer's keys or values, each row from its own position on.

    Args:
      cache: [B, K, S, H].
      new: [B, K, T, H].
      start: int [B], the slot of each row's first new position; start + T must not pass S, since the
        update would then slide back over earlier slots. Callers check it where they know it.

    Returns:
      The updated [B, K, S, H]; in place where XLA can donate the buffer.
    """
    update = lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=1)  # noqa: E731
    return jax.vmap(update)(cache, new.astype(cache.dtype), start)
