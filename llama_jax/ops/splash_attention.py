"""Causal attention for training on TPU: JAX's Pallas splash attention, with segments, groups and meshes.

The kernel computes only tiles that the causal mask does not exclude, in both passes, and keeps the output
and its log-sum-exp for the backward pass (FlashAttention, arXiv 2205.14135). Keys and values are not
repeated: each query head reads those of its group.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import ConfigError

RESIDUALS = "splash_residuals"
"""The checkpoint name of what the backward kernel reads besides q, k and v."""

LANES = 128  # the lanes of a TPU register: the side of a tile is a multiple of it

_HEADS_BNTH = P(sharding.BATCH, "tensor", "context", None)
_SEGMENTS_BT = P(sharding.BATCH, "context")
_SEGMENTS_BS = P(sharding.BATCH, None)


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None, *, interpret: bool = False
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, causal in the order of the row, within segments.

    Scores and softmax are f32. A length that is not a multiple of 128 is padded to one, unless the mesh axis
    `context` shards it. On a mesh each device runs the kernel on its own batch rows and heads; `context`
    shards the queries, and each device reads all earlier keys.

    Args:
      q: [B, T, N, H]; on TPU, H should be a multiple of 128, to which a smaller head is padded.
      k: [B, K, T, H], head-major; K divides N.
      v: [B, K, T, H].
      segment_ids: int [B, T]; a query attends only to keys of its own segment. None: each row is one segment.
      interpret: run the kernel in Pallas's interpret mode: slow, on any backend.

    Returns:
      [B, T, N, H] in q's dtype. The backward pass keeps q, k, v and two arrays named `RESIDUALS`.

    Raises:
      ConfigError: if the numbers of keys and queries differ, or the mesh does not divide heads or length.
    """
    length, heads = q.shape[1], q.shape[2]
    if k.shape[2] != length:
        raise ConfigError(
            f"splash attention needs as many keys as queries and got {k.shape[2]} and {length}; "
            "use the xla or blockwise backend with a cache"
        )
    axes = sharding.explicit_axes()
    context, tensor = axes.get("context", 1), axes.get("tensor", 1)
    if context > 1 and length % (LANES * context):
        raise ConfigError(
            f"splash attention: {length} tokens do not divide into blocks of {LANES} over mesh axis context "
            f"of size {context}; use a multiple of {LANES * context}"
        )
    if heads % tensor or k.shape[1] % tensor:
        raise ConfigError(
            f"splash attention: {heads} query and {k.shape[1]} key/value heads do not divide over mesh axis "
            f"tensor of size {tensor}"
        )
    # The kernel does not scale; this fuses with the operation that computes q.
    q = (q.astype(jnp.float32) / math.sqrt(q.shape[-1])).astype(q.dtype).transpose(0, 2, 1, 3)
    # Padding at the end, which the causal mask excludes for all other queries.
    if pad := -length % LANES:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, pad)))
    kernel = _kernel(length + pad, heads // tensor, context, interpret)
    segments = None if segment_ids is None else (segment_ids, segment_ids)
    apply = _sharded_kernel if axes else _batched_kernel
    out = apply(kernel, q, k, v, segments)
    return out[:, :, :length].transpose(0, 2, 1, 3)


def block_size(length: int) -> int:
    """The side of a tile: the largest of 1024, 512, 256 and 128 that divides `length`.

    Larger tiles have less overhead and read keys less often, but half of a tile on the diagonal is masked: at
    4096 tokens a ninth of the work with tiles of 512, a fifth with 1024, a third with 2048.
    """
    return math.gcd(length, 1024)


def _batched_kernel(
    kernel: kernel_lib.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """The kernel over a batch: [B, N, T, H] by [B, K, S, H] -> [B, N, T, H]."""

    def row(q: jax.Array, k: jax.Array, v: jax.Array, ids: tuple[jax.Array, jax.Array] | None) -> Any:
        return kernel(q, k, v, ids and kernel_lib.SegmentIds(*ids))

    return jax.vmap(row)(q, k, v, segments)


def _sharded_kernel(
    kernel: kernel_lib.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """`_batched_kernel` with batch, heads and queries sharded over the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    fit = functools.partial(sharding.restrict, names=sharding.explicit_axes())
    kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, fit(P(None, "context"))))
    in_specs = (
        kernel_spec,
        fit(_HEADS_BNTH),
        fit(sharding.CACHE_BKSH),
        fit(sharding.CACHE_BKSH),
        None if segments is None else (fit(_SEGMENTS_BT), fit(_SEGMENTS_BS)),
    )
    args = jax.tree.map(jax.sharding.reshard, (kernel, q, k, v, segments), in_specs)
    # The kernel's outputs carry no varying axes, so shard_map cannot check them.
    return jax.shard_map(_batched_kernel, in_specs=in_specs, out_specs=fit(_HEADS_BNTH), check_vma=False)(
        *args
    )


def _kernel(length: int, heads: int, shards: int, interpret: bool) -> kernel_lib.SplashAttentionKernel:
    """The causal kernel for `heads` query heads and `length` tokens in `shards` shards."""
    block = block_size(length // shards)
    blocks = kernel_lib.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = mask_lib.CausalMask((length, length), shard_count=shards)
    return kernel_lib.make_splash_mha(
        mask_lib.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )
