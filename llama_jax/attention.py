"""Causal grouped-query attention on arrays (arXiv 1706.03762, 2305.13245), with a choice of backend.

`xla` forms all scores of a layer at once; `blockwise` (after FlashAttention, arXiv 2205.14135) visits
them in [block, block] tiles, forwards and backwards, and keeps one number a query between the two.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import ConfigError

Backend = Literal["xla", "blockwise"]

_MASKED = -1e30  # finite: a tile whose keys are all masked must not make a NaN


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
      backend: `xla`, or `blockwise`, whose memory does not grow with T x S.
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
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    # [B, T, K, G, H] -> [B, K, G, T, H]: the heads that share a key stand together.
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    k_segments = None if where.k_segments is None else _whole(where.k_segments)
    where = where._replace(k_positions=_whole(where.k_positions), k_segments=k_segments)
    if backend == "blockwise":
        out = _blockwise(grouped, k, v, where, block_size)
    else:
        out = _xla(grouped, k, v, where)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _xla(q: jax.Array, k: jax.Array, v: jax.Array, where: Where) -> jax.Array:
    """[B, K, G, T, H] by [B, K, S, H] -> [B, K, G, T, H], all scores at once."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(where.mask(), scores / math.sqrt(q.shape[-1]), _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bksh->bkgth", weights, v, preferred_element_type=jnp.float32)


# Blockwise. The sequence axes are cut into blocks that lead, for lax.scan to walk; padding keys at the end
# stand past every query, so the causal mask hides them.


def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, where: Where, block_size: int) -> jax.Array:
    length, keys = q.shape[3], k.shape[2]
    q_segments, k_segments = where.q_segments, where.k_segments
    if q_segments is None or k_segments is None:
        q_segments, k_segments = jnp.zeros_like(where.q_positions), jnp.zeros_like(where.k_positions)
    # The loop over query blocks needs the whole sequence on a device; heads and batch stay split.
    q = sharding.constrain(q, P(sharding.BATCH, "tensor", None, None, None))
    t_block, s_block = min(block_size, length), min(block_size, keys)
    out = _tiles(
        _cut(q, 3, t_block),
        _cut(k, 2, s_block),
        _cut(v, 2, s_block),
        (_cut(_whole(where.q_positions), 1, t_block), _cut(_whole(q_segments), 1, t_block)),
        (_cut(where.k_positions, 1, s_block, fill=2**31 - 1), _cut(k_segments, 1, s_block)),
    )
    out = jnp.moveaxis(out, 0, 3)
    return out.reshape(*out.shape[:3], -1, out.shape[-1])[:, :, :, :length]


def _whole(x: jax.Array) -> jax.Array:
    """[B, S] with the sequence gathered over `context`."""
    return sharding.constrain(x, P(sharding.BATCH, None))


def _cut(x: jax.Array, axis: int, block: int, fill: int = 0) -> jax.Array:
    """[..., n, ...] -> [ceil(n / block), ..., block, ...], the last block padded with `fill`."""
    pad = -x.shape[axis] % block
    x = jnp.pad(x, [(0, pad if a == axis else 0) for a in range(x.ndim)], constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _tile_scores(q: jax.Array, k: jax.Array, q_at: Any, k_at: Any) -> tuple[jax.Array, jax.Array]:
    """Masked scores f32 [B, K, G, t, s] of one tile, and their mask."""
    mask = Where(q_at[0], k_at[0], q_at[1], k_at[1]).mask()
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores / math.sqrt(q.shape[-1]), _MASKED), mask


def _skip_if_masked(q_at: Any, k_at: Any, visit: Any, carry: Any) -> Any:
    """Visits a tile unless its mask is all False: half of a causal square costs nothing."""
    return jax.lax.cond(jnp.any(Where(q_at[0], k_at[0], q_at[1], k_at[1]).mask()), visit, lambda c: c, carry)


@jax.custom_vjp
def _tiles(q: jax.Array, k: jax.Array, v: jax.Array, q_at: Any, k_at: Any) -> jax.Array:
    return _tiles_forward(q, k, v, q_at, k_at)[0]


def _tiles_forward(q: jax.Array, k: jax.Array, v: jax.Array, q_at: Any, k_at: Any) -> Any:
    """Online softmax over key blocks, for each query block: f32 [n, B, K, G, t, H]; and what to save."""

    def query_block(_: None, block: Any) -> Any:
        q_i, at_i = block
        like = jnp.zeros_like(q_i, jnp.float32)

        def key_block(carry: Any, block: Any) -> Any:
            k_j, v_j, at_j = block

            def visit(carry: Any) -> Any:
                out, peak, total = carry
                scores, mask = _tile_scores(q_i, k_j, at_i, at_j)
                new_peak = jnp.maximum(peak, scores.max(-1))
                weights = jnp.where(mask, jnp.exp(scores - new_peak[..., None]), 0.0)
                shrink = jnp.exp(peak - new_peak)
                read = jnp.einsum(
                    "bkgts,bksh->bkgth", weights.astype(v_j.dtype), v_j, preferred_element_type=jnp.float32
                )
                return out * shrink[..., None] + read, new_peak, total * shrink + weights.sum(-1)

            return _skip_if_masked(at_i, at_j, visit, carry), None

        start = (like, like[..., 0] + _MASKED, like[..., 0])
        (out, peak, total), _ = jax.lax.scan(key_block, start, (k, v, k_at))
        total = jnp.maximum(total, 1e-30)  # a padding query has seen nothing
        return None, (out / total[..., None], peak + jnp.log(total))

    _, (out, log_total) = jax.lax.scan(query_block, None, (q, q_at))
    return out, (q, k, v, q_at, k_at, out, log_total)


def _tiles_backward(saved: Any, d_out: jax.Array) -> Any:
    """FlashAttention's backward pass (arXiv 2205.14135, algorithm 4): weights again from the log-sum-exp."""
    q, k, v, q_at, k_at, out, log_total = saved
    scale = 1 / math.sqrt(q.shape[-1])
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    inner = (d_out * out).sum(-1)  # [n, B, K, G, t]

    def key_block(dq: jax.Array, block: Any) -> Any:
        k_j, v_j, at_j = block

        def query_block(carry: Any, block: Any) -> Any:
            q_i, at_i, dq_i, d_out_i, inner_i, log_total_i = block

            def visit(carry: Any) -> Any:
                dq_i, dk_j, dv_j = carry
                scores, mask = _tile_scores(q_i, k_j, at_i, at_j)
                weights = jnp.where(mask, jnp.exp(scores - log_total_i[..., None]), 0.0)
                d_out_c = d_out_i.astype(v_j.dtype)
                d_weights = dot("bkgth,bksh->bkgts", d_out_c, v_j)
                d_scores = (weights * (d_weights - inner_i[..., None]) * scale).astype(q_i.dtype)
                return (
                    dq_i + dot("bkgts,bksh->bkgth", d_scores, k_j),
                    dk_j + dot("bkgts,bkgth->bksh", d_scores, q_i),
                    dv_j + dot("bkgts,bkgth->bksh", weights.astype(d_out_c.dtype), d_out_c),
                )

            dq_i, *dkv = _skip_if_masked(at_i, at_j, visit, (dq_i, *carry))
            return tuple(dkv), dq_i

        start = (jnp.zeros_like(k_j, jnp.float32), jnp.zeros_like(v_j, jnp.float32))
        dkv, dq = jax.lax.scan(query_block, start, (q, q_at, dq, d_out, inner, log_total))
        return dq, dkv

    dq, (dk, dv) = jax.lax.scan(key_block, jnp.zeros_like(q, jnp.float32), (k, v, k_at))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_tiles.defvjp(_tiles_forward, _tiles_backward)
