"""Causal grouped-query attention on arrays (arXiv 1706.03762, 2305.13245), with a choice of backend.

`xla` forms all scores of a layer at once; `blockwise` (after FlashAttention, arXiv 2205.14135) visits
them in [block, block] tiles, forwards and backwards, and keeps one number a query between the two;
`splash` does so in JAX's Pallas kernels for TPU.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.blockwise import MASKED, blockwise_attention
from llama_jax.errors import ConfigError
from llama_jax.linear import dot
from llama_jax.splash import splash_attention

Backend = Literal["xla", "blockwise", "splash"]


class Where(NamedTuple):
    """Where queries and keys stand; together they say which key a query may look at.

    A query sees the keys of its own segment at its own position and before. A key that nobody may see
    (padding) has a segment of its own, or a position past every query's.

    Attributes:
      q_positions: int [B, T].
      k_positions: int [B, S].
      q_segments: int [B, T], or None where each row is one segment.
      k_segments: int [B, S], or None.
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None

    def mask(self) -> jax.Array:
        """bool [B, 1, 1, T, S]: which scores count."""
        allowed = self.k_positions[:, None, :] <= self.q_positions[:, :, None]
        if self.q_segments is not None and self.k_segments is not None:
            allowed &= self.k_segments[:, None, :] == self.q_segments[:, :, None]
        return allowed[:, None, None]


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, where: Where, *, backend: Backend = "xla", block_size: int = 512
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, query head n reading key/value head n // (N / K).

    Scores and softmax are f32. Every query must be allowed at least one key (in causal attention its
    own), or its output is an average of keys it should not see.

    Args:
      q: [B, T, N, H].
      k: [B, K, S, H], head-major as in the cache; K divides N.
      v: [B, K, S, H].
      where: positions and segments of queries and keys.
      backend: `xla`; `blockwise`, whose memory does not grow with T x S; or `splash`, the same on a TPU,
        for queries and keys of the same rows in order (not against a cache).
      block_size: the side of a `blockwise` tile.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ConfigError: for an unknown backend.
    """
    if backend not in get_args(Backend):
        raise ConfigError(
            f"attention backend {backend!r} is unknown; use one of {', '.join(get_args(Backend))}"
        )
    if backend == "splash":
        return splash_attention(q, k, v, where.q_segments)
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    # [B, T, K, G, H] -> [B, K, G, T, H]: the heads that share a key stand together.
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    k_segments = None if where.k_segments is None else _whole(where.k_segments)
    where = where._replace(k_positions=_whole(where.k_positions), k_segments=k_segments)
    if backend == "blockwise":
        out = _blockwise(grouped, k, v, where, block_size)
    else:
        out = checkpoint_name(_xla(grouped, k, v, where), "attention_out")
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, where: Where) -> jax.Array:
    """[B, K, G, T, H] by [B, K, S, H] -> [B, K, G, T, H], all scores at once."""
    scores = dot("bkgth,bksh->bkgts", q, k)
    scores = jnp.where(where.mask(), scores / math.sqrt(q.shape[-1]), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return dot("bkgts,bksh->bkgth", weights, v).astype(q.dtype)


def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, where: Where, block_size: int) -> jax.Array:
    """The same in tiles, each device its own rows, heads and queries."""
    q_segments, k_segments = where.q_segments, where.k_segments
    if q_segments is None or k_segments is None:
        q_segments, k_segments = jnp.zeros_like(where.q_positions), jnp.zeros_like(where.k_positions)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, q_at: Any, k_at: Any) -> jax.Array:
        kv_heads = k.shape[1]
        merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731  # rows and heads are one dimension
        q_at, k_at = jax.tree.map(lambda x: jnp.repeat(x, kv_heads, axis=0), (q_at, k_at))
        out = blockwise_attention(merge(q), merge(k), merge(v), q_at, k_at, block_size=block_size)
        return out.reshape(q.shape)

    queries, keys = P(sharding.BATCH, "tensor", None, "context", None), sharding.CACHE_BKSH
    at = (sharding.TOKENS_BT,) * 2, (P(sharding.BATCH, None),) * 2
    run = sharding.per_device(local, (queries, keys, keys, *at), queries)
    return run(q, k, v, (where.q_positions, q_segments), (where.k_positions, k_segments))


def _whole(x: jax.Array) -> jax.Array:
    """[B, S] with the sequence gathered over `context`."""
    return sharding.constrain(x, P(sharding.BATCH, None))
