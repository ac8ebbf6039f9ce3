"""The key/value cache of decoding: allocated once and written in place.

Slot s of a batch row holds the key and value of the token at position s. A row that is shorter than others in
the batch has unwritten slots, which the causal mask excludes. Layers are separate arrays: slicing one stacked
array would copy it at every token. On a mesh, `context` divides the slots (`ops.striped_cache`).

A layer with a sliding window of w has w + `RUN_LENGTH` slots at most, which are a ring (`ops.ring_cache`):
slot s holds positions s, s + S, ... in turn, and memory does not grow with the text.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from llama_jax import sharding
from llama_jax.config import LayerKind, LlamaConfig
from llama_jax.errors import InputError
from llama_jax.ops import ring_cache, striped_cache
from llama_jax.ops.layouts import fp8_bits, fp8_numbers, write_slices

CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
_SHORT = {"fp8": "float8_e4m3fn"}
_STORED = {"int8": jnp.int8, "float8_e4m3fn": jnp.uint8}

RUN_LENGTH = 256
"""The slots of a ring beside its window: the most tokens that may be run at once, or be taken back."""


@chex.dataclass(frozen=True, mappable_dataclass=False)
class EightBits:
    """Keys or values of one layer, quantized to 8 bits with one scale per vector of a head.

    Attributes:
      values: [B, K, S, H], int8; or float8_e4m3fn as `layouts.fp8_bits` stores it, uint8.
      scale: f32 [B, K, S]; a vector is unscaled * scale.
    """

    values: jax.Array
    scale: jax.Array

    def unscaled(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The values in `dtype`."""
        return self.values.astype(dtype) if self.values.dtype == jnp.int8 else fp8_numbers(self.values, dtype)


Layer = jax.Array | EightBits


@chex.dataclass(frozen=True, mappable_dataclass=False)
class KVCache:
    """Keys (rotated) and values of every layer.

    Attributes:
      k: tuple of L arrays [B, K, S, H], or of `EightBits`. Attention on CPU is several times faster with this
        head-major layout than with [B, S, K, H].
      v: likewise.
    """

    k: tuple[Layer, ...]
    v: tuple[Layer, ...]

    @property
    def length(self) -> int:
        """S, the number of slots: of the longest layer, where rings are shorter."""
        return max(map(slots, self.k))


def slots(layer: Layer) -> int:
    """S of one layer."""
    return int(jax.tree.leaves(layer)[0].shape[2])


class Layout(NamedTuple):
    """How one layer's slots are read and written.

    Attributes:
      slots: their number, S.
      window: of the layer; None where it has as many keys as there are slots.
      ring: whether slot s holds positions s, s + S, ... in turn; otherwise it holds position s, or with
        `allowed` of `forward_cached` any.
    """

    slots: int
    window: int | None
    ring: bool


def layouts(config: LlamaConfig, cache: KVCache, length: int, *, in_order: bool) -> tuple[Layout, ...]:
    """The layout of every layer.

    Args:
      config: the model.
      cache: its cache.
      length: T, the number of tokens of a row that are run at once.
      in_order: whether slots are positions, modulo their number.

    Raises:
      InputError: for more tokens than a ring has slots for, beside the window of the first of them.
    """

    def layout(kind: LayerKind, layer: Layer) -> Layout:
        size, window = slots(layer), kind.window
        if window is None or window >= size:
            return Layout(size, None, ring=False)
        wraps = size == window + RUN_LENGTH  # as `init_cache` makes rings
        if length > (RUN_LENGTH + 1 if wraps else size):
            raise InputError(
                f"{length} tokens are run at once, and a layer with a window of {window} has {size} slots; "
                f"run up to {RUN_LENGTH + 1} at a time, or make the cache with run_length=None"
            )
        return Layout(size, window, ring=in_order and striped_cache.shards() == 1)

    return tuple(map(layout, config.layer_kinds, cache.k))


def init_cache(
    config: LlamaConfig,
    batch: int,
    length: int,
    dtype: jax.typing.DTypeLike,
    *,
    run_length: int | None = RUN_LENGTH,
) -> KVCache:
    """An empty cache, sharded over the current mesh.

    A batch that the batch axes of the mesh do not divide is replicated. `context` divides the slots.

    Args:
      config: the model.
      batch: B.
      length: S, which is rounded up to a multiple of `context`.
      dtype: float32, bfloat16, float16, or int8 or float8_e4m3fn (fp8), with half the bytes of bfloat16.
      run_length: the most tokens of a row that will be run at once, or taken back: a layer with a window of w
        has at most w + `run_length` slots. None: all layers have S, as they have over `context`, and as is
        needed where slots are not positions (`allowed` of `forward_cached`).

    Raises:
      InputError: for another dtype.
    """
    dtype = checked_dtype(dtype)
    shards = striped_cache.shards()
    spec = sharding.STRIPED_BKSH if shards > 1 else sharding.CACHE_BKSH

    def zeros() -> tuple[Layer, ...]:
        layers = []
        for kind in config.layer_kinds:
            slots = layer_slots(kind.window, length, run_length)
            shape = (batch, config.num_key_value_heads, slots, config.head_dim)
            layers.append(_empty(shape, dtype, sharding.out_sharding(spec, shape)))
        return tuple(layers)

    return KVCache(k=zeros(), v=zeros())


def layer_slots(window: int | None, length: int, run_length: int | None = RUN_LENGTH) -> int:
    """The slots of a layer in the cache of `init_cache`, which has the other arguments."""
    shards = striped_cache.shards()
    if window is None or run_length is None or shards > 1:
        return -(-length // shards) * shards
    return min(length, window + run_length)


def checked_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """`dtype` as a `jnp.dtype`.

    Raises:
      InputError: if a cache cannot have it.
    """
    try:
        known = jnp.dtype(_SHORT.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    except TypeError:
        known = None
    if known is None or known.name not in CACHE_DTYPES:
        raise InputError(f"cache_dtype is {dtype!r}; it must be one of {', '.join(CACHE_DTYPES)}")
    return known


def dtype_name(dtype: jax.typing.DTypeLike | None) -> str | None:
    """The name of `checked_dtype`, hashable as a static argument; None, the parameters' dtype, stays None."""
    return None if dtype is None else checked_dtype(dtype).name


def _empty(shape: tuple[int, ...], dtype: jnp.dtype, spec: jax.sharding.PartitionSpec | None) -> Layer:
    values = jnp.zeros(shape, _STORED.get(dtype.name, dtype), out_sharding=spec)
    return (
        EightBits(values=values, scale=jnp.zeros_like(values[..., 0], jnp.float32))
        if dtype.name in _STORED
        else values
    )


def write(
    cache: Layer, new: jax.Array, start: jax.Array, *, ring: bool = False, end: jax.Array | None = None
) -> Layer:
    """Writes the keys or values of T tokens into one layer, each batch row from its own slot on.

    Args:
      cache: [B, K, S, H], or `EightBits`.
      new: [B, K, T, H].
      start: int [B], the first slot to write in each row. start + T must be at most S: otherwise XLA clamps
        the start, and earlier slots are overwritten. Callers check it where they know it.
      ring: whether `start` is a position, and the slots a ring.
      end: int [B], with `ring`: the number of tokens in each row, after which there is padding; or None.

    Returns:
      The updated layer; written in place where XLA can reuse the buffer.
    """
    if isinstance(cache, EightBits):
        fp8 = cache.values.dtype == jnp.uint8
        new = new.astype(jnp.float32)
        scale = jnp.max(jnp.abs(new), axis=-1) / (448 if fp8 else 127)  # the largest number of the dtype
        values = new / jnp.where(scale > 0, scale, 1.0)[..., None]
        values = fp8_bits(values) if fp8 else jnp.round(values).astype(jnp.int8)
        stored: Layer = EightBits(values=values, scale=scale)
    else:
        stored = new.astype(cache.dtype)
    if striped_cache.shards() > 1:
        return striped_cache.write(cache, stored, start)
    if ring:
        return ring_cache.write(cache, stored, start, end)
    return jax.tree.map(lambda slots, new: write_slices(slots, new, start), cache, stored)


def grow(config: LlamaConfig, cache: KVCache, length: int) -> KVCache:
    """A cache for rows of `length` that holds what `cache` holds; rings grow to their full size at most."""

    def grown(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        result = []
        for layer, kind in zip(layers, config.layer_kinds, strict=True):
            size = layer_slots(kind.window, length, RUN_LENGTH)
            result.append(jax.tree.map(lambda x: striped_cache.grow(x, size), layer))  # noqa: B023
        return tuple(result)

    return KVCache(k=grown(cache.k), v=grown(cache.v))


def can_resume(config: LlamaConfig, cache: KVCache, written: int, start: int) -> bool:
    """Whether rows of which positions 0..written-1 have been run can be run again from position `start` on.

    A ring that has wrapped around lacks the oldest positions: up to `RUN_LENGTH` tokens can be taken back, of
    all that were written since it was last written from position 0 on.
    """

    def has_window(kind: LayerKind, layer: Layer) -> bool:
        return kind.window is None or written <= slots(layer) or written - start <= slots(layer) - kind.window

    return all(map(has_window, config.layer_kinds, cache.k))
