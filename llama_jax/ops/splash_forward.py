"""Causal attention on TPU in one Pallas kernel (FlashAttention, arXiv 2205.14135, algorithm 1).

A program is a tile of queries, and loops over the keys that it reads; a row's keys and values stay in VMEM.
Beside JAX's own (`jax.experimental.pallas.ops.tpu.splash_attention`), it scales the queries itself, which XLA
does by reading and writing them in HBM; and writes one log-sum-exp per query, where that writes 128.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from llama_jax.ops.splash_tiles import (
    BLOCK,
    COLUMNS,
    LANES,
    MASKED,
    ROWS,
    VMEM_BYTES,
    by_heads,
    columns,
    cost,
    from_heads,
    masked_scores,
    over_read_blocks,
)

MAX_KEYS, ON_V4 = 32_768, 8192  # in VMEM at a time, with heads of 128: 16 and 4 MiB


def attention_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    *,
    causal: bool,
    window: int | None = None,
    offset: jax.Array | int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(H) + mask) v over some keys, with the log-sum-exp to merge it with that of others.

    Scores and softmax are f32.

    Args:
      q: [B, T, N, H]; T is a multiple of 128.
      k: [B, K, S, H]; S is a multiple of 128, and K divides N.
      v: [B, K, S, H].
      q_segments: int [B, T], or None where each row is one segment.
      k_segments: int [B, S], or None.
      causal: whether query t reads keys 0..offset + t of these; otherwise all of its segment.
      window: the number of keys up to its own that a query reads, or None; needs `causal`.
      offset: the place of the first query among the keys.
      interpret: run the kernel in Pallas's interpret mode: slow, on any backend.

    Returns:
      [B, T, N, H] in q's dtype; and the log-sum-exp f32 [B, N, T], below -1e38 for a query that reads no key,
      whose output is finite.
    """
    keys, parts = k.shape[2], columns(k, MAX_KEYS, ON_V4)
    run = functools.partial(_forward, causal=causal, window=window, interpret=interpret)
    if parts == 1:
        return run(q, k, v, q_segments, k_segments, offset=offset)
    width = -(-keys // parts // LANES) * LANES
    batch, length, heads, _ = q.shape
    out, log_sum_exp = jnp.zeros(q.shape, jnp.float32), jnp.full((batch, heads, length), MASKED)
    for start in range(0, keys, width):
        these = slice(start, min(start + width, keys))
        ids = None if k_segments is None else k_segments[:, these]
        part, of_part = run(q, k[:, :, these], v[:, :, these], q_segments, ids, offset=offset - start)
        both = jnp.logaddexp(log_sum_exp, of_part)
        of_out, of_part = (jnp.exp(x - both).swapaxes(1, 2)[..., None] for x in (log_sum_exp, of_part))
        out = out * of_out + part.astype(jnp.float32) * of_part
        log_sum_exp = both
    return out.astype(q.dtype), log_sum_exp


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    *,
    causal: bool,
    window: int | None,
    offset: jax.Array | int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """`attention_forward` of as many keys as fit into VMEM."""
    batch, length, heads, size = q.shape
    kv_heads, keys = k.shape[1:3]
    group, rows = heads // kv_heads, batch * kv_heads
    block_q, block_k = math.gcd(length, BLOCK), math.gcd(keys, BLOCK)
    queries = pl.BlockSpec((None, None, block_q, size), lambda r, g, i, _: (r, g, i, 0))
    once = pl.Buffered(buffer_count=1)  # a row's keys are many tiles of work
    whole = pl.BlockSpec((None, keys, size), lambda r, _g, _i, _: (r, 0, 0), pipeline_mode=once)
    in_specs: list[Any] = [queries, whole, whole]
    args = [by_heads(q, kv_heads), *(x.reshape(rows, keys, size) for x in (k, v))]
    if q_segments is not None and k_segments is not None:
        in_specs += [
            pl.BlockSpec((None, block_q, LANES), lambda r, _g, i, _: (jax.lax.div(r, kv_heads), i, 0)),
            pl.BlockSpec((None, 1, keys), lambda r, _g, _i, _: (jax.lax.div(r, kv_heads), 0, 0)),
        ]
        args += [jnp.broadcast_to(q_segments[..., None], (batch, length, LANES)), k_segments[:, None]]
    column = pltpu.VMEM((block_q, LANES), jnp.float32)
    kernel = functools.partial(
        _kernel, segmented=q_segments is not None, causal=causal, window=window, block_k=block_k
    )
    out, log_sum_exp = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, group, length // block_q),
            in_specs=in_specs,
            out_specs=[queries, pl.BlockSpec((None, None, 1, block_q), lambda r, g, i, _: (r, g, 0, i))],
            scratch_shapes=[pltpu.VMEM((block_q, size), jnp.float32), column, column],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(args[0].shape, q.dtype),
            jax.ShapeDtypeStruct((rows, group, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost(q, k, 2, causal=causal, window=window, offset=offset),
        name="splash_forward",
        interpret=interpret,
    )(jnp.asarray(offset, jnp.int32).reshape(1), *args)
    return from_heads(out, q.shape), log_sum_exp.reshape(batch, heads, length)


def _kernel(
    offset_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    segmented: bool,
    causal: bool,
    window: int | None,
    block_k: int,
) -> None:
    """A tile of queries of one head; maxima and sums of its rows are repeated in all lanes."""
    q_ids_ref, k_ids_ref = refs[:2] if segmented else (None, None)
    out_ref, log_sum_exp_ref, out_sum, row_max, row_sum = refs[-5:]
    block_q, size = q_ref.shape
    first = offset_ref[0] + pl.program_id(2) * block_q
    out_sum[...] = jnp.zeros_like(out_sum)
    row_max[...] = jnp.full_like(row_max, MASKED)
    row_sum[...] = jnp.zeros_like(row_sum)
    q = (q_ref[...].astype(jnp.float32) / math.sqrt(size)).astype(q_ref.dtype)

    def add(key: Any, masked: bool) -> None:
        keys = pl.ds(key, block_k)
        scores = jax.lax.dot_general(q, k_ref[keys, :], ROWS, preferred_element_type=jnp.float32)
        ids = None
        if q_ids_ref is not None:
            ids = jnp.tile(q_ids_ref[...], (1, block_k // LANES)), k_ids_ref[:, keys]
        scores = masked_scores(scores, 0, first, key, window, ids, masked=masked)
        before = row_max[...]
        now = jnp.maximum(before, scores.max(1, keepdims=True))
        p = jnp.exp(scores - jnp.tile(now, (1, block_k // LANES)))
        shrink = jnp.exp(before - now)
        row_max[...] = now
        row_sum[...] = row_sum[...] * shrink + p.sum(1, keepdims=True)
        part = jax.lax.dot_general(
            p.astype(v_ref.dtype), v_ref[keys, :], COLUMNS, preferred_element_type=jnp.float32
        )
        out_sum[...] = out_sum[...] * _lanes(shrink, size) + part

    over_read_blocks(add, first, block_q, block_k, k_ref.shape[0] // block_k, causal=causal, window=window)
    total = jnp.where(row_sum[...] == 0, 1.0, row_sum[...])
    out_ref[...] = (out_sum[...] / _lanes(total, size)).astype(out_ref.dtype)
    log_sum_exp_ref[...] = (row_max[...] + jnp.log(total)).T[:1]


def _lanes(column: jax.Array, size: int) -> jax.Array:
    """A column that is repeated in 128 lanes, in `size` of them."""
    return column[:, :size] if size <= LANES else jnp.tile(column, (1, size // LANES))
