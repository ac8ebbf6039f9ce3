"""Attention in [block, block] tiles, in both passes (after FlashAttention, arXiv 2205.14135).

The scores of a whole sequence are never in memory: the backward pass reads the output and its log-sum-exp.
The sequence dimensions are split into blocks, and the block index leads, for `lax.scan`. Padding keys at the
end have a position after every query, so the causal mask excludes them. With a sliding window the loops pass
over the tiles around the diagonal alone, so that the cost of a row is linear in its length.
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
from llama_jax.ops import spmd, tiles
from llama_jax.ops.products import dot, weight_gradient

MASKED = -1e30  # finite: a tile whose keys are all masked must not give NaN


def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: Any,
    k_ids: Any,
    *,
    block_size: int,
    window: int | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v on one device's arrays.

    Args:
      q: [M, G, T, H]; M is batch times key/value heads.
      k: [M, S, H].
      v: [M, S, H].
      q_ids: positions and segments of the queries, int [M, T] each.
      k_ids: positions and segments of the keys, int [M, S] each.
      block_size: the side of a tile.
      window: the number of positions up to its own whose keys a query attends to; None for all.

    Returns:
      [M, G, T, H] in q's dtype.
    """
    blocks = _tiles(q, k, v, q_ids, k_ids, block_size, window)
    return tiles.join(_tiled_attention(window, *blocks), 2, q.shape[2])


def partial_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    *,
    causal: bool,
    block_size: int = 512,
) -> tuple[jax.Array, jax.Array]:
    """Attention to some of the keys on one device's arrays, with the log-sum-exp to merge it with others.

    Args:
      q: [B, N, T, H].
      k: [B, K, S, H].
      v: [B, K, S, H].
      q_segments: int [B, T], or None where each row is one segment.
      k_segments: int [B, S], or None.
      causal: whether query t reads keys 0..t of these; otherwise all of its segment.
      block_size: the side of a tile.

    Returns:
      f32 [B, N, T, H]; and the log-sum-exp f32 [B, N, T], about `MASKED` for a query that reads no key.
    """
    arrays = _by_key_value_head(q, k, v, q_segments, k_segments, causal)
    out, log_sum_exp = _map_heads(_forward, _tiles(*arrays, block_size))
    length = q.shape[2]
    return tiles.join(out, 2, length).reshape(q.shape), tiles.join(log_sum_exp, 2, length).reshape(
        q.shape[:3]
    )


def partial_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    out: jax.Array,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
    *,
    causal: bool,
    block_size: int = 512,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to the gradients of q, and the gradients of k and v from these queries; f32.

    Args:
      q, k, v, q_segments, k_segments, causal, block_size: as for `partial_attention`.
      out: [B, N, T, H], attention to all keys.
      log_sum_exp: f32 [B, N, T], of the scores of all keys.
      d_out: [B, N, T, H], the cotangent of `out`.
    """
    arrays = _by_key_value_head(q, k, v, q_segments, k_segments, causal)
    grouped_shape = arrays[0].shape
    results = (x.reshape(*grouped_shape[:3], *x.shape[3:]) for x in (out, log_sum_exp, d_out))
    block = min(block_size, q.shape[2])
    blocks = (*_tiles(*arrays, block_size), *(tiles.split(x, 2, block) for x in results))
    dq, dk, dv = _map_heads(_backward, blocks)
    dk, dv = (tiles.join(d, 1, k.shape[2]).reshape(k.shape) for d in (dk, dv))
    return tiles.join(dq, 2, q.shape[2]).reshape(q.shape), dk, dv


def _by_key_value_head(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    causal: bool,
) -> tuple[Any, Any, Any, Any, Any]:
    """The arguments of `blockwise_attention` from those of `partial_attention`."""
    (batch, kv_heads, keys, _), length = k.shape, q.shape[2]
    order, key_order = jnp.arange(length, dtype=jnp.int32), jnp.arange(keys, dtype=jnp.int32)
    order = order if causal else jnp.full_like(order, keys)

    def ids(order: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        order = jnp.broadcast_to(order, (batch, order.shape[0]))
        segments = jnp.zeros_like(order) if segments is None else segments
        return jnp.repeat(order, kv_heads, axis=0), jnp.repeat(segments, kv_heads, axis=0)

    grouped = q.reshape(batch * kv_heads, -1, *q.shape[2:])
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    return grouped, k, v, ids(order, q_segments), ids(key_order, k_segments)


def _tiles(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: Any,
    k_ids: Any,
    block_size: int,
    window: int | None = None,
) -> Any:
    """The arguments of `blockwise_attention` in blocks, whose index leads."""
    # Work-around for JAX (0.10.2, 0.12.0.1): the barrier makes the masks depend on q. Otherwise a scan over
    # layers computes them once, before the first layer, and keeps T x S booleans.
    inputs = jax.lax.optimization_barrier((q, k, v, q_ids, k_ids))
    q, k, v, q_ids, k_ids = spmd.pvary_like(inputs)
    t_block, s_block = min(block_size, q.shape[2]), min(block_size, k.shape[1])
    # A padding query at position 0 would be near every key block.
    q_fill = 0 if window is None else tiles.LAST
    return (
        tiles.split(q, 2, t_block),
        tiles.split(k, 1, s_block),
        tiles.split(v, 1, s_block),
        (tiles.split(q_ids[0], 1, t_block, fill=q_fill), tiles.split(q_ids[1], 1, t_block)),
        (tiles.split(k_ids[0], 1, s_block, fill=tiles.LAST), tiles.split(k_ids[1], 1, s_block)),
    )


def sharded_blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: tuple[jax.Array, jax.Array | None],
    keys: tuple[jax.Array, jax.Array | None],
    prefix: Mapping[str, jax.Array] | None,
    *,
    block_size: int,
    window: int | None = None,
) -> jax.Array:
    """`blockwise_attention` on the current mesh: each device computes its own batch rows, heads and queries.

    Args:
      q: [B, K, G, T, H].
      k: [B, K, S, H].
      v: [B, K, S, H].
      queries: positions int [B, T] and segments int [B, T], or None where each row is one segment.
      keys: the same, int [B, S] each.
      prefix: keys `k` and values `v` [K, P, H] of the P positions before a row, of every segment; or None.
      block_size: the side of a tile.
      window: the number of positions up to its own whose keys a query attends to; None for all.

    Returns:
      [B, K, G, T, H] in q's dtype.
    """
    q_ids, k_ids = (
        (positions, jnp.zeros_like(positions) if queries[1] is None or keys[1] is None else segments)
        for positions, segments in (queries, keys)
    )

    def local(q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Any, k_ids: Any, prefix: Any) -> jax.Array:
        if prefix is not None:
            k, v, k_ids = _prepend(prefix, k, v, k_ids, window)
        kv_heads = k.shape[1]
        merge = lambda x: x.reshape(-1, *x.shape[2:])  # noqa: E731  # batch and key/value heads
        q_ids, k_ids = jax.tree.map(lambda x: jnp.repeat(x, kv_heads, axis=0), (q_ids, k_ids))
        out = blockwise_attention(
            merge(q), merge(k), merge(v), q_ids, k_ids, block_size=block_size, window=window
        )
        return out.reshape(q.shape)

    at = (sharding.TOKENS_BT,) * 2, (P(sharding.BATCH, None),) * 2
    prefix_specs = None if prefix is None else dict.fromkeys(prefix, sharding.PREFIX_KPH)
    in_specs = (sharding.QUERIES_BKGTH, sharding.CACHE_BKSH, sharding.CACHE_BKSH, *at, prefix_specs)
    return spmd.shard_map_or_call(local, in_specs, sharding.QUERIES_BKGTH)(q, k, v, q_ids, k_ids, prefix)


def _prepend(
    prefix: Mapping[str, jax.Array], k: jax.Array, v: jax.Array, k_ids: Any, window: int | None
) -> tuple[jax.Array, jax.Array, Any]:
    """Keys and values [B, K, S, H] after those of a prefix, which every segment attends to."""

    def joined(first: jax.Array, rest: jax.Array) -> jax.Array:
        first = jnp.broadcast_to(first.astype(rest.dtype), (rest.shape[0], *first.shape))
        return jnp.concatenate(spmd.pvary_all(first, rest), axis=2)

    before = jnp.zeros((k.shape[0], prefix["k"].shape[1]), jnp.int32)
    positions: Any = -1 if window is None else jnp.arange(-before.shape[1], 0, dtype=jnp.int32)
    extended = [
        jnp.concatenate(spmd.pvary_all(jnp.full_like(before, fill), at), axis=1)
        for fill, at in zip((positions, tiles.ANY_SEGMENT), k_ids, strict=True)
    ]
    return joined(prefix["k"], k), joined(prefix["v"], v), tuple(extended)


def _zeros_like(like: jax.Array) -> jax.Array:
    return spmd.pvary_like(jnp.zeros_like(like, jnp.float32), like)


def _scores(
    q: jax.Array, k: jax.Array, q_ids: Any, k_ids: Any, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """Masked scores f32 [M, G, t, s] of one tile, and their mask."""
    mask = tiles.tile_mask(q_ids, k_ids, window)
    return jnp.where(mask, dot("mgth,msh->mgts", q, k) / math.sqrt(q.shape[-1]), MASKED), mask


def _skip_if_masked(q_ids: Any, k_ids: Any, window: int | None, update: Any, carry: Any) -> Any:
    """`update(carry)` unless the tile's mask is all False, as it is for half of the causal tiles."""
    return jax.lax.cond(jnp.any(tiles.tile_mask(q_ids, k_ids, window)), update, lambda carry: carry, carry)


def _map_heads(function: Callable[..., Any], arrays: Any) -> Any:
    """`function` over arrays [n, M, ...], all M at once; on CPU one after the other.

    Work-around for XLA:CPU (JAX 0.10.2, 0.12.0.1), which computes the scores of all heads before it uses
    them: those of one head stay in the processor's cache from product to product. The results are f32
    whatever
    the input: to write a slice of a bf16 array, XLA:CPU (JAX 0.10.2) converts the whole array to f32 and
    back.
    """

    def sequentially(*arrays: Any) -> Any:
        heads = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], arrays)
        results = jax.lax.map(lambda head: function(*head), heads)
        return jax.tree.map(lambda x: jnp.moveaxis(x[:, :, 0], 0, 1), results)

    return jax.lax.platform_dependent(*arrays, cpu=sequentially, default=function)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiled_attention(window: int | None, q: jax.Array, k: Any, v: Any, q_ids: Any, k_ids: Any) -> jax.Array:
    return _tiled_attention_forward(window, q, k, v, q_ids, k_ids)[0]


def _tiled_attention_forward(window: int | None, q: Any, k: Any, v: Any, q_ids: Any, k_ids: Any) -> Any:
    forward = functools.partial(_forward, window=window)
    out, log_sum_exp = _map_heads(forward, (q, k, v, q_ids, k_ids))
    out = checkpoint_name(out.astype(q.dtype), "attention_out")
    return out, (q, k, v, q_ids, k_ids, out, checkpoint_name(log_sum_exp, "attention_out"))


def _tiled_attention_backward(window: int | None, residuals: Any, d_out: jax.Array) -> Any:
    gradients = _map_heads(functools.partial(_backward, window=window), (*residuals, d_out))
    return *(d.astype(x.dtype) for d, x in zip(gradients, residuals, strict=False)), None, None


_tiled_attention.defvjp(_tiled_attention_forward, _tiled_attention_backward)


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Any, k_ids: Any, window: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Online softmax over the key blocks of each query block: f32 [n, M, G, t, H] and its log-sum-exp."""

    def query_block(_: None, block: Any) -> Any:
        q_i, ids_i = block
        like = _zeros_like(q_i)

        def key_block(carry: Any, block: Any) -> Any:
            k_j, v_j, ids_j = block

            def update(carry: Any) -> Any:
                out, row_max, total = carry
                scores, mask = _scores(q_i, k_j, ids_i, ids_j, window)
                new_max = jnp.maximum(row_max, scores.max(-1))
                weights = jnp.where(mask, jnp.exp(scores - new_max[..., None]), 0.0)
                correction = jnp.exp(row_max - new_max)
                values = dot("mgts,msh->mgth", weights.astype(v_j.dtype), v_j)
                return out * correction[..., None] + values, new_max, total * correction + weights.sum(-1)

            return _skip_if_masked(ids_i, ids_j, window, update, carry), None

        start = (like, like[..., 0] + MASKED, like[..., 0])
        if window is None:
            (out, row_max, total), _ = jax.lax.scan(key_block, start, (k, v, k_ids))
        else:
            near_key_block = lambda j, carry: key_block(carry, tiles.take((k, v, k_ids), j))[0]  # noqa: E731
            near = tiles.near(window, ids_i[0][None], k_ids[0])
            out, row_max, total = jax.lax.fori_loop(*near, near_key_block, start)
        total = jnp.maximum(total, 1e-30)  # a padding query attends to no key
        return None, (out / total[..., None], row_max + jnp.log(total))

    return jax.lax.scan(query_block, None, (q, q_ids))[1]


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_ids: Any,
    k_ids: Any,
    out: jax.Array,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
    window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """FlashAttention's backward pass (algorithm 4), with weights recomputed from the log-sum-exp; f32."""
    scale = 1 / math.sqrt(q.shape[-1])
    inner = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)  # [n, M, G, t]
    over_queries = functools.partial(weight_gradient, "mgts", y_dims="mgth", out_dims="msh")

    def key_block(dq: jax.Array, block: Any) -> Any:
        k_j, v_j, ids_j = block

        def query_block(carry: Any, block: Any) -> Any:
            q_i, ids_i, dq_i, d_out_i, inner_i, log_sum_exp_i = block

            def update(carry: Any) -> Any:
                dq_i, dk_j, dv_j = carry
                scores, mask = _scores(q_i, k_j, ids_i, ids_j, window)
                weights = jnp.where(mask, jnp.exp(scores - log_sum_exp_i[..., None]), 0.0)
                d_weights = dot("mgth,msh->mgts", d_out_i, v_j)
                d_scores = (weights * (d_weights - inner_i[..., None]) * scale).astype(q_i.dtype)
                return (
                    dq_i + dot("mgts,msh->mgth", d_scores, k_j),
                    dk_j + over_queries(x=d_scores, y=q_i),
                    dv_j + over_queries(x=weights.astype(d_out_i.dtype), y=d_out_i),
                )

            dq_i, *dkv = _skip_if_masked(ids_i, ids_j, window, update, (dq_i, *carry))
            return tuple(dkv), dq_i

        def near_query_block(i: jax.Array, carry: Any) -> Any:
            dkv, dq = carry
            dkv, dq_i = query_block(dkv, tiles.take((q, q_ids, dq, d_out, inner, log_sum_exp), i))
            return dkv, jax.lax.dynamic_update_index_in_dim(dq, dq_i, i, 0)

        start = (_zeros_like(k_j), _zeros_like(v_j))
        if window is None:
            dkv, dq = jax.lax.scan(query_block, start, (q, q_ids, dq, d_out, inner, log_sum_exp))
        else:
            near = tiles.near(window, q_ids[0], ids_j[0][None])
            dkv, dq = jax.lax.fori_loop(*near, near_query_block, (start, dq))
        return dq, dkv

    dq, (dk, dv) = jax.lax.scan(key_block, _zeros_like(q), (k, v, k_ids))
    return dq, dk, dv
