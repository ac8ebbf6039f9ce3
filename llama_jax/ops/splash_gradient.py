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

LANES = 128  # of a register
BLOCK = 512  # queries of a tile, and keys whose scores are computed at a time
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # JAX's splash kernel's score of a masked key
MAX_KEYS = 8192  # in VMEM at a time, with heads of 128: 20 MiB
_VMEM_BYTES = 40 * 2**20

_ROWS = (((1,), (1,)), ((), ()))  # x y^T
_COLUMNS = (((1,), (0,)), ((), ()))  # x y


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
      q: [B, N, T, H], divided by sqrt(H); T is a multiple of 128.
      k: [B, K, S, H]; S is a multiple of 128, and K divides N.
      v: [B, K, S, H].
      q_segments: int [B, T], or None where each row is one segment.
      k_segments: int [B, S], or None.
      out: [B, N, T, H], attention to all keys that the queries read, of which these may be a part.
      log_sum_exp: f32 [B, N, T], of the scores of all those keys.
      d_out: [B, N, T, H], the cotangent of `out`.
      causal: whether query t reads keys 0..offset + t of these; otherwise all of its segment.
      window: the number of keys up to its own that a query reads, or None; needs `causal`.
      offset: the place of the first query among the keys.
      interpret: run the kernel in Pallas's interpret mode.

    Returns:
      dq, dk and dv in the dtypes and shapes of q, k and v.
    """
    keys = k.shape[2]
    columns = -(-keys * -(-k.shape[-1] // LANES) // MAX_KEYS)
    delta = jnp.einsum("bnth,bnth->bnt", out.astype(jnp.float32), d_out.astype(jnp.float32))
    run = functools.partial(_gradients, causal=causal, window=window, interpret=interpret)
    if columns == 1:
        return run(q, k, v, q_segments, k_segments, log_sum_exp, delta, d_out, offset=offset)
    dq, parts = jnp.zeros(q.shape, jnp.float32), []
    width = -(-keys // columns // LANES) * LANES
    for start in range(0, keys, width):
        these = slice(start, min(start + width, keys))
        ids = None if k_segments is None else k_segments[:, these]
        column = k[:, :, these], v[:, :, these], q_segments, ids
        part, *of_keys = run(q, *column, log_sum_exp, delta, d_out, offset=offset - start)
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
    log_sum_exp: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    causal: bool,
    window: int | None,
    offset: jax.Array | int,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`attention_gradients` of as many keys as fit into VMEM; `delta` [B, N, T] is the sum of out * d_out."""
    batch, heads, length, size = q.shape
    kv_heads, keys = k.shape[1:3]
    group, rows = heads // kv_heads, batch * kv_heads
    block_q, block_k = math.gcd(length, BLOCK), math.gcd(keys, BLOCK)

    def row(r: Any, _g: Any, _i: Any, _offset: Any) -> tuple[Any, ...]:
        return r, 0, 0

    def tile(r: Any, g: Any, i: Any, _offset: Any) -> tuple[Any, ...]:
        return r, g, i, 0

    once = pl.Buffered(buffer_count=1)  # a row's keys are many tiles of work
    queries = pl.BlockSpec((None, None, block_q, size), tile)
    per_query = pl.BlockSpec((None, group, block_q), lambda r, _g, i, _offset: (r, 0, i))
    whole = pl.BlockSpec((None, keys, size), row, pipeline_mode=once)
    in_specs: list[Any] = [queries, whole, whole, queries, per_query, per_query]

    def by_row(x: jax.Array) -> jax.Array:
        return x.reshape(rows, group, *x.shape[2:])

    args = [by_row(q), k.reshape(rows, keys, size), v.reshape(rows, keys, size), by_row(d_out)]
    args += [by_row(log_sum_exp), by_row(delta)]
    if q_segments is not None and k_segments is not None:
        in_specs += [
            pl.BlockSpec((None, 1, block_q), lambda r, _g, i, _offset: (jax.lax.div(r, kv_heads), 0, i)),
            pl.BlockSpec(
                (None, keys, LANES),
                lambda r, _g, _i, _offset: (jax.lax.div(r, kv_heads), 0, 0),
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
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        name="splash_gradient",
        interpret=interpret,
    )(jnp.asarray(offset, jnp.int32).reshape(1), *args)
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


def _kernel(
    offset_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    d_out_ref: Any,
    log_sum_exp_ref: Any,
    delta_ref: Any,
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
    first = offset_ref[0] + tile * block_q  # the place of the tile's first query among the keys

    def add(at: Any, masked: bool) -> None:
        keys = pl.ds(at, block_k)
        q, d_out, k = q_ref[...], d_out_ref[...], k_ref[keys, :]
        scores = jax.lax.dot_general(k, q, _ROWS, preferred_element_type=jnp.float32)
        masks = []
        if masked:
            query_at = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            key_at = at + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            masks.append(key_at <= query_at)
            if window is not None:
                masks.append(key_at > query_at - window)
        if q_ids_ref is not None:
            k_ids = jnp.tile(k_ids_ref[keys, :], (1, block_q // LANES))
            masks.append(k_ids == q_ids_ref[...])
        if masks:
            scores = jnp.where(functools.reduce(jnp.logical_and, masks), scores, MASKED)
        p = jnp.exp(scores - log_sum_exp_ref[pl.ds(head, 1), :])
        dv_sum[keys, :] += jax.lax.dot_general(
            p.astype(d_out.dtype), d_out, _COLUMNS, preferred_element_type=jnp.float32
        )
        dp = jax.lax.dot_general(v_ref[keys, :], d_out, _ROWS, preferred_element_type=jnp.float32)
        ds = p * (dp - delta_ref[pl.ds(head, 1), :])
        dk_sum[keys, :] += jax.lax.dot_general(
            ds.astype(q.dtype), q, _COLUMNS, preferred_element_type=jnp.float32
        )
        dq_sum[...] += jax.lax.dot_general(
            ds.T.astype(k.dtype), k, _COLUMNS, preferred_element_type=jnp.float32
        )

    def add_blocks(low: Any, high: Any, masked: bool) -> None:
        def body(j: Any, _: Any) -> None:
            add(j * block_k, masked)

        jax.lax.fori_loop(low, high, body, None)

    def block(at: Any) -> Any:
        return jax.lax.div(jnp.clip(at, 0, blocks * block_k), block_k)

    if not causal:
        add_blocks(0, blocks, masked=False)
    else:  # blocks that some query reads, and among them those that all read
        low: Any = 0
        high, all_high = block(first + block_q + block_k - 1), block(first + 1)
        if window is not None:
            low = jnp.minimum(block(first + block_q - window + block_k - 1), high)
            all_high = jnp.maximum(all_high, low)
            add_blocks(block(first - window + 1), low, masked=True)
        add_blocks(low, all_high, masked=False)
        add_blocks(all_high, high, masked=True)
    dq_ref[...] = dq_sum[...].astype(dq_ref.dtype)

    @pl.when((head == pl.num_programs(1) - 1) & (tile == pl.num_programs(2) - 1))
    def end() -> None:
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)
