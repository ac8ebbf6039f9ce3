"""The gradient of causal attention on TPU, one Pallas kernel (FlashAttention, arXiv 2205.14135, algorithm 4).

JAX's own kernels (`jax.experimental.pallas.ops.tpu.splash_attention`) either compute the scores twice, or
write dq once per column of tiles, which XLA then sums: 3.6% of a step of Llama 2 7B. Here a program is a tile
of queries, and loops over the keys that it reads: keys, values and their gradients of a whole row stay in
VMEM, so that everything is read from HBM once and written once, and tiles that are masked cost nothing.
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
    ROWS,
    VMEM_BYTES,
    by_heads,
    columns,
    cost,
    from_heads,
    masked_scores,
    over_read_blocks,
)

MAX_KEYS, ON_V4 = 8192, 4096  # in VMEM at a time, with heads of 128: 20 and 10 MiB


def attention_gradients(
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
    window: int | None = None,
    offset: jax.Array | int = 0,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to the gradients of q, and the gradients of k and v from these queries.

    Args:
      q: [B, T, N, H]; T is a multiple of 128.
      k: [B, K, S, H]; S is a multiple of 128, and K divides N.
      v: [B, K, S, H].
      q_segments: int [B, T], or None where each row is one segment.
      k_segments: int [B, S], or None.
      out: [B, T, N, H], attention to all keys that the queries read, of which these may be a part.
      log_sum_exp: f32 [B, N, T], of the scores of all those keys.
      d_out: [B, T, N, H], the cotangent of `out`.
      causal: whether query t reads keys 0..offset + t of these; otherwise all of its segment.
      window: the number of keys up to its own that a query reads, or None; needs `causal`.
      offset: the place of the first query among the keys.
      interpret: run the kernel in Pallas's interpret mode.

    Returns:
      dq, dk and dv in the dtypes and shapes of q, k and v.
    """
    keys, count = k.shape[2], columns(k, MAX_KEYS, ON_V4)
    run = functools.partial(_gradients, causal=causal, window=window, interpret=interpret)
    if count == 1:
        return run(q, k, v, q_segments, k_segments, out, log_sum_exp, d_out, offset=offset)
    dq, parts = jnp.zeros(q.shape, jnp.float32), []
    width = -(-keys // count // LANES) * LANES
    for start in range(0, keys, width):
        these = slice(start, min(start + width, keys))
        ids = None if k_segments is None else k_segments[:, these]
        column = k[:, :, these], v[:, :, these], q_segments, ids
        part, *of_keys = run(q, *column, out, log_sum_exp, d_out, offset=offset - start)
        dq += part.astype(jnp.float32)
        parts.append(of_keys)
    dk, dv = (jnp.concatenate(part, 2) for part in zip(*parts, strict=True))
    return dq.astype(q.dtype), dk, dv


def _gradients(
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
    window: int | None,
    offset: jax.Array | int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`attention_gradients` of as many keys as fit into VMEM."""
    batch, length, heads, size = q.shape
    kv_heads, keys = k.shape[1:3]
    group, rows = heads // kv_heads, batch * kv_heads
    block_q, block_k = math.gcd(length, BLOCK), math.gcd(keys, BLOCK)

    once = pl.Buffered(buffer_count=1)  # a row's keys are many tiles of work
    queries = pl.BlockSpec((None, None, block_q, size), lambda r, g, i, _: (r, g, i, 0))
    per_query = pl.BlockSpec((None, group, block_q), lambda r, _g, i, _: (r, 0, i))
    whole = pl.BlockSpec((None, keys, size), lambda r, _g, _i, _: (r, 0, 0), pipeline_mode=once)
    in_specs: list[Any] = [queries, whole, whole, queries, queries, per_query]
    args = [by_heads(q, kv_heads), *(x.reshape(rows, keys, size) for x in (k, v))]
    args += [by_heads(out, kv_heads), by_heads(d_out, kv_heads), log_sum_exp.reshape(rows, group, length)]
    if q_segments is not None and k_segments is not None:
        in_specs += [
            pl.BlockSpec((None, 1, block_q), lambda r, _g, i, _: (jax.lax.div(r, kv_heads), 0, i)),
            pl.BlockSpec(
                (None, keys, LANES),
                lambda r, _g, _i, _: (jax.lax.div(r, kv_heads), 0, 0),
                pipeline_mode=once,
            ),
        ]
        args += [q_segments[:, None], jnp.broadcast_to(k_segments[..., None], (batch, keys, LANES))]
    kernel = functools.partial(
        _kernel, segmented=q_segments is not None, causal=causal, window=window, block_k=block_k
    )
    f32_row = pltpu.VMEM((keys, size), jnp.float32)
    dq, dk, dv = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows, group, length // block_q),
            in_specs=in_specs,
            out_specs=[queries, whole, whole],
            scratch_shapes=[pltpu.VMEM((block_q, size), jnp.float32), f32_row, f32_row],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args[:3]],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        cost_estimate=cost(q, k, 5, causal=causal, window=window, offset=offset),
        name="splash_gradient",
        interpret=interpret,
    )(jnp.asarray(offset, jnp.int32).reshape(1), *args)
    return from_heads(dq, q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def _kernel(
    offset_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    d_out_ref: Any,
    log_sum_exp_ref: Any,
    *refs: Any,
    segmented: bool,
    causal: bool,
    window: int | None,
    block_k: int,
) -> None:
    """A tile of queries of one head; scores have keys in rows and queries in columns."""
    q_ids_ref, k_ids_ref = refs[:2] if segmented else (None, None)
    dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum = refs[-6:]
    head, tile = pl.program_id(1), pl.program_id(2)
    block_q, blocks = q_ref.shape[0], k_ref.shape[0] // block_k

    @pl.when((head == 0) & (tile == 0))
    def start() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    dq_sum[...] = jnp.zeros_like(dq_sum)
    # Here, since XLA fuses it into the product that computes d_out, which then runs at 60% of peak.
    products = out_ref[...].astype(jnp.float32) * d_out_ref[...].astype(jnp.float32)
    delta = products.T.sum(0, keepdims=True)
    first = offset_ref[0] + tile * block_q  # the place of the tile's first query among the keys

    scale = 1 / math.sqrt(q_ref.shape[1])
    q = (q_ref[...].astype(jnp.float32) * scale).astype(q_ref.dtype)

    def add(key: Any, masked: bool) -> None:
        keys = pl.ds(key, block_k)
        d_out, k = d_out_ref[...], k_ref[keys, :]
        scores = jax.lax.dot_general(k, q, ROWS, preferred_element_type=jnp.float32)
        ids = None
        if q_ids_ref is not None:
            ids = q_ids_ref[...], jnp.tile(k_ids_ref[keys, :], (1, block_q // LANES))
        scores = masked_scores(scores, 1, first, key, window, ids, masked=masked)
        p = jnp.exp(scores - log_sum_exp_ref[pl.ds(head, 1), :])
        dv_sum[keys, :] += jax.lax.dot_general(
            p.astype(d_out.dtype), d_out, COLUMNS, preferred_element_type=jnp.float32
        )
        dp = jax.lax.dot_general(v_ref[keys, :], d_out, ROWS, preferred_element_type=jnp.float32)
        ds = p * (dp - delta)
        dk_sum[keys, :] += jax.lax.dot_general(
            ds.astype(q.dtype), q, COLUMNS, preferred_element_type=jnp.float32
        )
        dq_sum[...] += jax.lax.dot_general(
            ds.T.astype(k.dtype), k, COLUMNS, preferred_element_type=jnp.float32
        )

    over_read_blocks(add, first, block_q, block_k, blocks, causal=causal, window=window)
    dq_ref[...] = (dq_sum[...] * scale).astype(dq_ref.dtype)

    @pl.when((head == pl.num_programs(1) - 1) & (tile == pl.num_programs(2) - 1))
    def end() -> None:
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)
