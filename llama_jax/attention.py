"""Causal grouped-query attention on arrays (arXiv 1706.03762, 2305.13245), with a choice of backend.

`xla` forms all scores of a layer at once; `blockwise` (after FlashAttention, arXiv 2205.14135) visits
them in [block, block] tiles, forwards and backwards, and keeps one number a query between the two;
`splash` does so in JAX's Pallas kernels for TPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import ConfigError
from llama_jax.kv_cache import Int8, Layer
from llama_jax.ops import spmd
from llama_jax.ops.blockwise_attention import MASKED, sharded_blockwise_attention
from llama_jax.ops.products import dot, query_key_product
from llama_jax.ops.splash_attention import splash_attention

Backend = Literal["xla", "blockwise", "splash"]
# Keys `k` and values `v` [K, P, H] that stand before every row's own, and that every query sees: what prefix
# tuning learns (arXiv 2101.00190).
KeyValues = Mapping[str, jax.Array]


class AttentionMask(NamedTuple):
    """Where queries and keys stand; together they say which key a query may look at.

    A query sees the keys of its own segment at its own position and before. A key that nobody may see
    (padding) has a segment of its own, or a position past every query's.

    Attributes:
      q_positions: int [B, T].
      k_positions: int [B, S].
      q_segments: int [B, T], or None where each row is one segment.
      k_segments: int [B, S], or None.
      allowed: bool [B, T, S], instead of the rule above, where it is another (beams of one row, say).
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    allowed: jax.Array | None = None

    def mask(self) -> jax.Array:
        """bool [B, 1, 1, T, S]: which scores count."""
        if self.allowed is not None:
            return self.allowed[:, None, None]
        allowed = self.k_positions[:, None, :] <= self.q_positions[:, :, None]
        if self.q_segments is not None and self.k_segments is not None:
            allowed &= self.k_segments[:, None, :] == self.q_segments[:, :, None]
        return allowed[:, None, None]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    where: AttentionMask,
    prefix: KeyValues | None = None,
    *,
    backend: Backend = "xla",
    block_size: int = 512,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, query head n reading key/value head n // (N / K).

    Scores and softmax are f32. Every query must be allowed at least one key (in causal attention its
    own), or its output is an average of keys it should not see.

    Args:
      q: [B, T, N, H].
      k: [B, K, S, H], head-major as in the cache; K divides N.
      v: [B, K, S, H].
      where: positions and segments of queries and keys.
      prefix: more keys and values, for all queries; not with `splash`.
      backend: `xla`; `blockwise`, whose memory does not grow with T x S; or `splash`, the same on a TPU,
        for queries and keys of the same rows in order (not against a cache).
      block_size: the side of a `blockwise` tile.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ConfigError: for an unknown backend, or a prefix with `splash`.
    """
    if backend not in get_args(Backend):
        raise ConfigError(
            f"attention backend {backend!r} is unknown; use one of {', '.join(get_args(Backend))}"
        )
    if backend == "splash":
        if prefix is not None:
            raise ConfigError("attention backend 'splash' takes no prefix; use 'blockwise'")
        return splash_attention(q, k, v, where.q_segments)
    grouped = _grouped(q, k.shape[1])
    k_segments = None if where.k_segments is None else _whole(where.k_segments)
    where = where._replace(k_positions=_whole(where.k_positions), k_segments=k_segments)
    if backend == "blockwise":
        queries = where.q_positions, where.q_segments
        keys = where.k_positions, where.k_segments
        out = sharded_blockwise_attention(grouped, k, v, queries, keys, prefix, block_size=block_size)
    else:
        out = checkpoint_name(_xla(grouped, k, v, where, prefix), "attention_out")
    return _ungrouped(out, q)


def cached_attention(
    q: jax.Array,
    k: Layer,
    v: Layer,
    where: AttentionMask,
    prefix: KeyValues | None = None,
    *,
    used: jax.Array | None = None,
    block_size: int = 256,
) -> jax.Array:
    """`attention` against one layer of a key/value cache, of any dtype that a cache may have.

    Args:
      q: [B, T, N, H].
      k: [B, K, S, H], or int8 with its scales.
      v: likewise.
      where: positions of queries and slots, or which slots each query is allowed.
      prefix: keys and values outside the cache, for all queries.
      used: int [], how many of the first slots hold anything. Given it, the cache is visited in blocks
        and what lies beyond is not read: for many queries at once. Without it all scores are formed at
        once, which for a few queries is quicker.
      block_size: slots a block.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    grouped = _grouped(q, jax.tree.leaves(k)[0].shape[1])
    where = where._replace(k_positions=_whole(where.k_positions))
    slots = where.k_positions.shape[1]
    if used is None or slots <= block_size:
        return _ungrouped(_xla(grouped, k, v, where, prefix), q)
    return _ungrouped(_in_blocks(grouped, k, v, where, prefix, used, block_size), q)


def _grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, T, H]: the heads that share a key stand together."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    # A reshape may lose the layout of dimensions of size one.
    return sharding.constrain(grouped, sharding.QUERIES_BKGTH)


def _ungrouped(out: jax.Array, like: jax.Array) -> jax.Array:
    return out.transpose(0, 3, 1, 2, 4).reshape(like.shape).astype(like.dtype)


def _xla(q: jax.Array, k: Layer, v: Layer, where: AttentionMask, prefix: KeyValues | None) -> jax.Array:
    """[B, K, G, T, H] by [B, K, S, H] -> [B, K, G, T, H], all scores at once."""
    scores = _scores(q, k, where.mask())
    if prefix is None:
        # Divided when they are summed up, [T, H] numbers in the place of [T, S].
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        return (_weighted(weights, v, q.dtype) / weights.sum(-1, keepdims=True)).astype(q.dtype)
    # Joined as scores, of which there are few: joining the keys would copy the cache at every token.
    first = _prefix_scores(q, prefix)
    weights = jax.nn.softmax(jnp.concatenate([first, scores], axis=-1), axis=-1)
    length = first.shape[-1]
    out = _weighted(weights[..., length:], v, q.dtype) + _prefix_weighted(
        weights[..., :length], prefix, q.dtype
    )
    return out.astype(q.dtype)


def _prefix_scores(q: jax.Array, prefix: KeyValues) -> jax.Array:
    """f32 [B, K, G, T, P], scaled."""
    keys = sharding.constrain(prefix["k"].astype(q.dtype), sharding.PREFIX_KPH)
    return dot("bkgth,kph->bkgtp", q, keys) / math.sqrt(q.shape[-1])


def _prefix_weighted(weights: jax.Array, prefix: KeyValues, dtype: jnp.dtype) -> jax.Array:
    """Sums of the prefix's values f32 [B, K, G, T, H] by weights f32 [B, K, G, T, P]."""
    values = sharding.constrain(prefix["v"].astype(dtype), sharding.PREFIX_KPH)
    return dot("bkgtp,kph->bkgth", weights.astype(dtype), values)


def _scores(q: jax.Array, k: Layer, mask: jax.Array) -> jax.Array:
    """f32 [B, K, G, T, S], scaled and masked."""
    keys = (k.values if isinstance(k, Int8) else k).astype(q.dtype)
    scores = query_key_product(q, keys)
    if isinstance(k, Int8):
        scores = scores * k.scale[:, :, None, None]
    return jnp.where(mask, scores / math.sqrt(q.shape[-1]), MASKED)


def _weighted(weights: jax.Array, v: Layer, dtype: jnp.dtype) -> jax.Array:
    """Sums of values f32 [B, K, G, T, H] by weights f32 [B, K, G, T, S]."""
    if isinstance(v, Int8):
        weights, v = weights * v.scale[:, :, None, None], v.values
    return dot("bkgts,bksh->bkgth", weights.astype(dtype), v.astype(dtype))


def _in_blocks(
    q: jax.Array,
    k: Layer,
    v: Layer,
    where: AttentionMask,
    prefix: KeyValues | None,
    used: jax.Array,
    block_size: int,
) -> jax.Array:
    """`_xla` over the first `used` slots, a block at a time (FlashAttention's running softmax)."""
    slots = where.k_positions.shape[1]

    def block(state: tuple[jax.Array, ...], index: jax.Array) -> tuple[jax.Array, ...]:
        top, total, out = state
        # The last block may overlap the one before it: what that has seen already does not count again.
        start = jnp.minimum(index * block_size, slots - block_size)
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, block_size, axis)  # noqa: E731
        at = where._replace(k_positions=cut(where.k_positions, 1))
        if where.allowed is not None:
            at = at._replace(allowed=cut(where.allowed, 2))
        fresh = start + jnp.arange(block_size) >= index * block_size
        keys, values = jax.tree.map(lambda x: cut(x, 2), (k, v))
        scores = _scores(q, keys, at.mask() & fresh)
        new_top = jnp.maximum(top, scores.max(-1))
        weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        # A block in which a query may see nothing leaves weights of one where all is MASKED.
        weights = jnp.where(scores > MASKED, weights, 0.0)
        out = out * shrink[..., None] + _weighted(weights, values, q.dtype)
        return new_top, total * shrink + weights.sum(-1), out

    # Derived from q, to be laid out over a mesh as it is.
    out = jnp.zeros_like(q, jnp.float32)
    state = (jnp.full_like(out[..., 0], MASKED), out[..., 0], out)
    if prefix is not None:
        first = _prefix_scores(q, prefix)
        top = first.max(-1)
        weights = jnp.exp(first - top[..., None])
        state = (top, weights.sum(-1), _prefix_weighted(weights, prefix, q.dtype))
    state = spmd.pvary_like(state, (q, k, v, where))
    blocks = -(-used // block_size)
    _, total, out = jax.lax.fori_loop(0, blocks, lambda index, state: block(state, index), state)
    return (out / total[..., None]).astype(q.dtype)


def _whole(x: jax.Array) -> jax.Array:
    """[B, S] with the sequence gathered over `context`."""
    return sharding.constrain(x, P(sharding.BATCH, None))
