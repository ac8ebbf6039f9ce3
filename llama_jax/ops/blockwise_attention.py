"""Attention in [block, block] tiles, forwards and backwards (after FlashAttention, arXiv 2205.14135).

No score matrix of a whole sequence ever exists: between the two passes one number a query is kept. The
sequence axes are cut into blocks that lead, for `lax.scan` to walk; padding keys at the end stand past
every query, so the causal mask hides them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops import spmd
from llama_jax.ops.products import dot, weight_gradient

MASKED = -1e30  # finite: a tile whose keys are all masked must not make a NaN
EVERY_SEGMENT = -(2**31)  # the segment of keys that queries of every segment see


def blockwise_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, q_at: Any, k_at: Any, *, block_size: int
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v on one device's arrays.

    Args:
      q: [M, G, T, H]; M is batch times key/value heads.
      k: [M, S, H].
      v: [M, S, H].
      q_at: (positions, segments) of the queries, int [M, T] each.
      k_at: the same of the keys, int [M, S] each.
      block_size: the side of a tile.

    Returns:
      [M, G, T, H] in q's dtype.
    """
    length, keys = q.shape[2], k.shape[1]
    # Behind a barrier the masks depend on q: in a scan over layers JAX would otherwise compute them once,
    # before the first layer, and keep the whole T x S of them.
    inputs = jax.lax.optimization_barrier((q, k, v, q_at, k_at))
    q, k, v, q_at, k_at = spmd.pvary_like(inputs)
    t_block, s_block = min(block_size, length), min(block_size, keys)
    blocks = (
        _cut(q, 2, t_block),
        _cut(k, 1, s_block),
        _cut(v, 1, s_block),
        tuple(_cut(at, 1, t_block) for at in q_at),
        (_cut(k_at[0], 1, s_block, fill=2**31 - 1), _cut(k_at[1], 1, s_block)),
    )
    out = jnp.moveaxis(_tiles(*blocks), 0, 2)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])[:, :, :length]


def sharded_blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: tuple[jax.Array, jax.Array | None],
    keys: tuple[jax.Array, jax.Array | None],
    prefix: Mapping[str, jax.Array] | None,
    *,
    block_size: int,
) -> jax.Array:
    """`blockwise_attention` on the current mesh: each device computes its own batch rows, heads and queries.

    Args:
      q: [B, K, G, T, H].
      k: [B, K, S, H].
      v: [B, K, S, H].
      queries: positions int [B, T] and segments int [B, T], or None where each row is one segment.
      keys: the same, int [B, S] each.
      prefix: keys `k` and values `v` [K, P, H] that every query attends to, or None.
      block_size: the side of a tile.

    Returns:
      [B, K, G, T, H] in q's dtype.
    """
    q_at, k_at = (
        (positions, jnp.zeros_like(positions) if queries[1] is None or keys[1] is None else segments)
        for positions, segments in (queries, keys)
    )

    def local(q: jax.Array, k: jax.Array, v: jax.Array, q_at: Any, k_at: Any, prefix: Any) -> jax.Array:
        if prefix is not None:
            k, v, k_at = _prepend(prefix, k, v, k_at)
        kv_heads = k.shape[1]
        merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731  # batch and key/value heads
        q_at, k_at = jax.tree.map(lambda x: jnp.repeat(x, kv_heads, axis=0), (q_at, k_at))
        out = blockwise_attention(merge(q), merge(k), merge(v), q_at, k_at, block_size=block_size)
        return out.reshape(q.shape)

    at = (sharding.TOKENS_BT,) * 2, (P(sharding.BATCH, None),) * 2
    prefix_specs = None if prefix is None else dict.fromkeys(prefix, sharding.PREFIX_KPH)
    in_specs = (sharding.QUERIES_BKGTH, sharding.CACHE_BKSH, sharding.CACHE_BKSH, *at, prefix_specs)
    return spmd.shard_map_or_call(local, in_specs, sharding.QUERIES_BKGTH)(q, k, v, q_at, k_at, prefix)


def _prepend(
    prefix: Mapping[str, jax.Array], k: jax.Array, v: jax.Array, k_at: Any
) -> tuple[jax.Array, jax.Array, Any]:
    """Keys and values [B, K, S, H] after those of a prefix, which every segment attends to."""

    def joined(first: jax.Array, rest: jax.Array) -> jax.Array:
        first = jnp.broadcast_to(first.astype(rest.dtype), (rest.shape[0], *first.shape))
        return jnp.concatenate(spmd.pvary_all(first, rest), axis=2)

    before = jnp.zeros((k.shape[0], prefix["k"].shape[1]), jnp.int32)
    extended = [
        jnp.concatenate(spmd.pvary_all(jnp.full_like(before, fill), at), axis=1)
        for fill, at in zip((-1, EVERY_SEGMENT), k_at, strict=True)
    ]
    return joined(prefix["k"], k), joined(prefix["v"], v), tuple(extended)


def _zeros(like: jax.Array) -> jax.Array:
    return spmd.pvary_like(jnp.zeros_like(like, jnp.float32), like)


def _cut(x: jax.Array, axis: int, block: int, fill: int = 0) -> jax.Array:
    """[..., n, ...] -> [ceil(n / block), ..., block, ...], the last block padded with `fill`."""
    pad = -x.shape[axis] % block
    x = jnp.pad(x, [(0, pad if a == axis else 0) for a in range(x.ndim)], constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _mask(q_at: Any, k_at: Any) -> jax.Array:
    """bool [M, 1, t, s]: which scores of a tile count."""
    causal, segments = k_at[0][:, None, :] <= q_at[0][:, :, None], k_at[1][:, None, :]
    return (causal & ((segments == q_at[1][:, :, None]) | (segments == EVERY_SEGMENT)))[:, None]


def _scores(q: jax.Array, k: jax.Array, q_at: Any, k_at: Any) -> tuple[jax.Array, jax.Array]:
    """Masked scores f32 [M, G, t, s] of one tile, and their mask."""
    mask = _mask(q_at, k_at)
    return jnp.where(mask, dot("mgth,msh->mgts", q, k) / math.sqrt(q.shape[-1]), MASKED), mask


def _skip_if_masked(q_at: Any, k_at: Any, visit: Any, carry: Any) -> Any:
    """Visits a tile unless its mask is all False: half of a causal square costs nothing."""
    return jax.lax.cond(jnp.any(_mask(q_at, k_at)), visit, lambda c: c, carry)


def _map_heads(function: Callable[..., Any], arrays: Any) -> Any:
    """`function` over arrays [n, M, ...]: at once, or on a CPU one head after the other.

    One at a time, a head's scores stay in the processor's cache from product to product. Its results are
    f32 in both cases: XLA:CPU writes a part of a bf16 array by converting all of it to f32 and back.
    """

    def sequentially(*arrays: Any) -> Any:
        heads = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], arrays)
        results = jax.lax.map(lambda head: function(*head), heads)
        return jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), results)

    return jax.lax.platform_dependent(*arrays, cpu=sequentially, default=function)


@jax.custom_vjp
def _tiles(q: jax.Array, k: jax.Array, v: jax.Array, q_at: Any, k_at: Any) -> jax.Array:
    return _tiles_forward(q, k, v, q_at, k_at)[0]


def _tiles_forward(q: jax.Array, k: jax.Array, v: jax.Array, q_at: Any, k_at: Any) -> Any:
    out, log_total = _map_heads(_forward, (q, k, v, q_at, k_at))
    out = checkpoint_name(out.astype(q.dtype), "attention_out")
    return out, (q, k, v, q_at, k_at, out, checkpoint_name(log_total, "attention_out"))


def _tiles_backward(saved: Any, d_out: jax.Array) -> Any:
    gradients = _map_heads(_backward, (*saved, d_out))
    return *(d.astype(x.dtype) for d, x in zip(gradients, saved, strict=False)), None, None


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, q_at: Any, k_at: Any) -> tuple[jax.Array, jax.Array]:
    """Online softmax over key blocks, for each query block: f32 [n, M, G, t, H] and its log-sum-exp."""

    def query_block(_: None, block: Any) -> Any:
        q_i, at_i = block
        like = _zeros(q_i)

        def key_block(carry: Any, block: Any) -> Any:
            k_j, v_j, at_j = block

            def visit(carry: Any) -> Any:
                out, peak, total = carry
                scores, mask = _scores(q_i, k_j, at_i, at_j)
                new_peak = jnp.maximum(peak, scores.max(-1))
                weights = jnp.where(mask, jnp.exp(scores - new_peak[..., None]), 0.0)
                shrink = jnp.exp(peak - new_peak)
                read = dot("mgts,msh->mgth", weights.astype(v_j.dtype), v_j)
                return out * shrink[..., None] + read, new_peak, total * shrink + weights.sum(-1)

            return _skip_if_masked(at_i, at_j, visit, carry), None

        start = (like, like[..., 0] + MASKED, like[..., 0])
        (out, peak, total), _ = jax.lax.scan(key_block, start, (k, v, k_at))
        total = jnp.maximum(total, 1e-30)  # a padding query has seen nothing
        return None, (out / total[..., None], peak + jnp.log(total))

    return jax.lax.scan(query_block, None, (q, q_at))[1]


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_at: Any,
    k_at: Any,
    out: jax.Array,
    log_total: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """FlashAttention's backward pass (algorithm 4): weights again from the log-sum-exp; f32."""
    scale = 1 / math.sqrt(q.shape[-1])
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # [n, M, G, t]
    over_queries = functools.partial(weight_gradient, "mgts", y_dims="mgth", out_dims="msh")

    def key_block(dq: jax.Array, block: Any) -> Any:
        k_j, v_j, at_j = block

        def query_block(carry: Any, block: Any) -> Any:
            q_i, at_i, dq_i, d_out_i, inner_i, log_total_i = block

            def visit(carry: Any) -> Any:
                dq_i, dk_j, dv_j = carry
                scores, mask = _scores(q_i, k_j, at_i, at_j)
                weights = jnp.where(mask, jnp.exp(scores - log_total_i[..., None]), 0.0)
                d_weights = dot("mgth,msh->mgts", d_out_i, v_j)
                d_scores = (weights * (d_weights - inner_i[..., None]) * scale).astype(q_i.dtype)
                return (
                    dq_i + dot("mgts,msh->mgth", d_scores, k_j),
                    dk_j + over_queries(x=d_scores, y=q_i),
                    dv_j + over_queries(x=weights.astype(d_out_i.dtype), y=d_out_i),
                )

            dq_i, *dkv = _skip_if_masked(at_i, at_j, visit, (dq_i, *carry))
            return tuple(dkv), dq_i

        start = (_zeros(k_j), _zeros(v_j))
        dkv, dq = jax.lax.scan(query_block, start, (q, q_at, dq, d_out, inner, log_total))
        return dq, dkv

    dq, (dk, dv) = jax.lax.scan(key_block, _zeros(q), (k, v, k_at))
    return dq, dk, dv
