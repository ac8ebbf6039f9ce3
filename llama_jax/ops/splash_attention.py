"""Causal attention for training on TPU: JAX's Pallas splash attention, with segments, groups and meshes.

The kernel computes only tiles that the causal mask does not exclude, in both passes, and keeps the output
and its log-sum-exp for the backward pass (FlashAttention, arXiv 2205.14135). Keys and values are not
repeated: each query head reads those of its group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import ConfigError

RESIDUALS = "splash_residuals"
"""The checkpoint name of what the backward kernel reads besides q, k and v."""

LANES = 128  # the lanes of a TPU register: the side of a tile is a multiple of it
COMPUTE_BLOCK = 512  # keys whose scores are computed at a time
FUSED_COLUMNS = 4  # of tiles, at most, where one kernel computes the whole gradient
RING_FUSED_COLUMNS = 8  # in a step of ring attention

AXIS = "context"

_SEGMENTS_BT = P(sharding.BATCH, None)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, causal in the order of the row, within segments.

    Scores and softmax are f32. A length that is not a multiple of 128 is padded to one. On a mesh each device
    runs the kernel on its own batch rows and heads; with a window on its own queries too: `context` shards
    them, and each device reads all keys. Without a window `ops.ring_attention` does that.

    Args:
      q: [B, T, N, H]; on TPU, H should be a multiple of 128, to which a smaller head is padded.
      k: [B, K, T, H], head-major; K divides N.
      v: [B, K, T, H].
      segment_ids: int [B, T]; a query attends only to keys of its own segment. None: each row is one segment.
      window: the number of keys up to its own that a query attends to; None for all.
      interpret: run the kernel in Pallas's interpret mode: slow, on any backend.

    Returns:
      [B, T, N, H] in q's dtype. The backward pass keeps q, k, v and two arrays named `RESIDUALS`.

    Raises:
      ConfigError: if the numbers of keys and queries differ, or the mesh does not divide the heads.
    """
    length, heads = q.shape[1], q.shape[2]
    if k.shape[2] != length:
        raise ConfigError(
            f"splash attention needs as many keys as queries and got {k.shape[2]} and {length}; "
            "use the xla or blockwise backend with a cache"
        )
    axes = sharding.explicit_axes()
    tensor = axes.get("tensor", 1)
    if heads % tensor or k.shape[1] % tensor:
        raise ConfigError(
            f"splash attention: {heads} query and {k.shape[1]} key/value heads do not divide over mesh axis "
            f"tensor of size {tensor}"
        )
    # The kernel does not scale; this fuses with the operation that computes q.
    q = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype).transpose(0, 2, 1, 3)
    # Padding at the end, which the causal mask excludes for all other queries.
    shards = 1 if window is None else axes.get("context", 1)
    if pad := -length % (LANES * shards):
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, pad)))
    square = length + pad, length + pad
    mask = mask_lib.CausalMask(square) if window is None else mask_lib.LocalMask(square, (window - 1, 0), 0)
    blocks = block_sizes(square[0] // shards, square[1], window=window)
    kernel = _kernel(mask, heads // k.shape[1], interpret, blocks, shards=shards)
    segments = None if segment_ids is None else (segment_ids, segment_ids)
    if axes:
        out = _sharded_kernel(kernel, q, k, v, segments, AXIS if shards > 1 else None)
    else:
        out = _batched_kernel(kernel, q, k, v, segments)
    return out[:, :, :length].transpose(0, 2, 1, 3)


def block_size(length: int, window: int | None = None) -> int:
    """The side of a tile: the largest power of two that divides `length`, up to 1024; from 8192 tokens, 2048.

    With a window shorter than that, up to 1024: of the tiles at both of its ends, half is masked.

    Larger tiles have less overhead (a third of a microsecond each, beside two of products on a v5p core at
    1024) and read keys less often, but half of a tile on the diagonal is masked: at 4096 tokens a ninth of
    the work with tiles of 512, a fifth with 1024, a third with 2048. MaxText's configurations for v6e have
    the same sizes (benchmarks/maxtext_trillium_model_configs.py: Llama 2 at 4096, Llama 3.1 at 8192).
    """
    return math.gcd(length, 2048 if min(length, window or length) >= 8192 else 1024)


def block_sizes(
    queries: int, keys: int, *, ring: bool = False, window: int | None = None
) -> kernel_lib.BlockSizes:
    """The tiles of the kernels for these numbers of queries and keys.

    Scores are computed 512 keys at a time, so that the softmax of some overlaps with the products of others
    (the default of openxla/tokamax). One backward kernel with 5 products replaces two with 7, as in MaxText's
    configurations for v6e and of its largest models for v5p, where its writing out dq for each column of
    tiles is cheap: up to 4 columns.

    Args:
      queries: T on a device.
      keys: S on a device.
      ring: for a step of ring attention, where the one kernel runs up to 8 columns: MaxText reports 47 to 61%
        of peak with it on 64 v5p chips at 256k and 1M tokens (pull request 4755), once both cores work, as
        they do here.
      window: of the layer, or None.
    """
    block, kv_block = block_size(queries, window), block_size(keys, window)
    compute = math.gcd(kv_block, COMPUTE_BLOCK)
    fused = keys // kv_block <= (RING_FUSED_COLUMNS if ring else FUSED_COLUMNS)
    return kernel_lib.BlockSizes(
        block_q=block,
        block_kv=kv_block,
        block_kv_compute=compute,
        block_q_dkv=block,
        block_kv_dkv=kv_block,
        block_kv_dkv_compute=compute,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else kv_block,
        use_fused_bwd_kernel=fused,
    )


def _batched_kernel(
    kernel: kernel_lib.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
) -> Any:
    """The kernel over a batch: [B, N, T, H] by [B, K, S, H] -> [B, N, T, H], and residuals."""

    def group(q: jax.Array, k: jax.Array, v: jax.Array, ids: tuple[jax.Array, jax.Array] | None) -> Any:
        return kernel(q, k, v, ids and kernel_lib.SegmentIds(*ids))

    out = _over_groups(group, segments, (q,), (k, v))
    return jax.tree.map(lambda x: x.reshape(*q.shape[:3], *x.shape[4:]), out)


def _over_groups(function: Callable[..., Any], segments: Any, queries: Any, keys: Any) -> Any:
    """`function` over batch rows and key heads, of q [B, N, T, ...] and k [B, K, S, H].

    A group of heads is a row of its own: Pallas divides rows, and nothing else in the backward kernels, among
    the two cores of a v4 or v5p chip, which may have a single sequence.
    """
    heads = keys[0].shape[1]
    grouped = [x.reshape(x.shape[0], heads, -1, *x.shape[2:]) for x in queries]
    q, *others = grouped
    row = jax.vmap(function, in_axes=(0, 0, 0, None, *(0,) * len(others)))
    return jax.vmap(row)(q, *keys, segments, *others)


def _sharded_kernel(
    kernel: kernel_lib.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
    q_axis: str | None = None,
) -> jax.Array:
    """`_batched_kernel` with batch and heads sharded over the current mesh, and queries over `q_axis`."""
    axes = sharding.explicit_axes()
    fit = functools.partial(sharding.restrict, names=axes)
    # The kernel cannot divide a mask over a mesh of which a caller's `shard_map` has some axes.
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, q_axis)))
    queries = fit(P(sharding.BATCH, "tensor", q_axis, None))
    in_specs = (
        kernel_spec,
        queries,
        fit(sharding.CACHE_BKSH),
        fit(sharding.CACHE_BKSH),
        None if segments is None else (fit(P(sharding.BATCH, q_axis)), fit(_SEGMENTS_BT)),
    )
    args = jax.tree.map(jax.sharding.reshard, (kernel, q, k, v, segments), in_specs)
    # The kernel's outputs carry no varying axes, so shard_map cannot check them.
    return jax.shard_map(_batched_kernel, in_specs=in_specs, out_specs=queries, check_vma=False)(*args)


def _kernel(
    mask: mask_lib.Mask,
    group: int,
    interpret: bool,
    blocks: kernel_lib.BlockSizes,
    *,
    ring: bool = False,
    shards: int = 1,
) -> Any:
    """The kernel with this mask [T, S] for the `group` query heads of a key head; `shards` divide T."""
    return kernel_lib.make_splash_mqa(
        mask_lib.MultiHeadMask([mask] * group),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
        save_residuals=ring,
    )


def partial_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
    *,
    causal: bool,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to some of the keys on one device's arrays, with the log-sum-exp to merge it with others.

    Args:
      q: [B, N, T, H], divided by sqrt(H); T is a multiple of 128.
      k: [B, K, S, H]; S is a multiple of 128.
      v: [B, K, S, H].
      q_segments: int [B, T], or None where each row is one segment.
      k_segments: int [B, S], or None.
      causal: whether query t reads keys 0..t of these; otherwise all of its segment.
      interpret: run the kernel in Pallas's interpret mode.

    Returns:
      [B, N, T, H] in q's dtype; and the log-sum-exp f32 [B, N, T], about -1e38 for a query that reads no key.
    """
    segments = None if q_segments is None or k_segments is None else (q_segments, k_segments)
    kernel = _partial_kernel(q, k, causal, interpret)
    out, (log_sum_exp,) = _batched_kernel(kernel, q, k, v, segments)
    return out, log_sum_exp


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
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What these keys add to the gradients of q, and the gradients of k and v from these queries.

    Args:
      q, k, v, q_segments, k_segments, causal, interpret: as for `partial_attention`.
      out: [B, N, T, H], attention to all keys.
      log_sum_exp: f32 [B, N, T], of the scores of all keys.
      d_out: [B, N, T, H], the cotangent of `out`.
    """
    kernel = _partial_kernel(q, k, causal, interpret)
    masks = kernel.dq_mask_info, kernel.dkv_mask_info

    def group(q: Any, k: Any, v: Any, ids: Any, out: Any, log_sum_exp: Any, d_out: Any) -> Any:
        residuals = (q, k, v, ids and kernel_lib.SegmentIds(*ids), None, out, log_sum_exp, *masks)
        # Private: tests/test_private_seams.py. The public kernel differentiates only its own output.
        return kernel_lib._splash_attention_bwd(**kernel.kwargs, res=residuals, do=d_out)[3:6]

    segments = None if q_segments is None or k_segments is None else (q_segments, k_segments)
    dq, dk, dv = _over_groups(group, segments, (q, out, log_sum_exp, d_out), (k, v))
    return dq.reshape(q.shape), dk, dv


def _partial_kernel(q: jax.Array, k: jax.Array, causal: bool, interpret: bool) -> Any:
    mask = (mask_lib.CausalMask if causal else mask_lib.FullMask)((q.shape[2], k.shape[2]))
    blocks = block_sizes(*mask.shape, ring=True)
    return _kernel(mask, q.shape[1] // k.shape[1], interpret, blocks, ring=True)
