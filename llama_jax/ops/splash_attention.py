"""Causal attention for training on TPU: Pallas kernels, with segments, groups and meshes.

Forward JAX's splash attention, backward the kernel of `ops.splash_gradient`. Both compute only tiles that the
mask does not exclude; what the backward pass needs is the output and its log-sum-exp (FlashAttention, arXiv
2205.14135). Keys and values are not repeated: each query head reads those of its group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel_lib
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as mask_lib
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import ConfigError
from llama_jax.ops.splash_gradient import LANES, attention_gradients

RESIDUALS = "splash_residuals"
"""The checkpoint name of what the backward kernel reads besides q, k and v."""

COMPUTE_BLOCK = 512  # keys whose scores the forward kernel computes at a time

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
    if pad := -length % (LANES * _query_shards(window)):
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (q, k, v))
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, pad)))
    queries, keys, *_ = _specs(
        _query_shards(window)
    )  # here, so that their gradients are laid out as they are
    q, k, v = (sharding.constrain(x, spec) for x, spec in ((q, queries), (k, keys), (v, keys)))
    out = _attention(window, interpret, q, k, v, segment_ids)
    return out[:, :, :length].transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    window: int | None, interpret: bool, q: jax.Array, k: Any, v: Any, segments: jax.Array | None
) -> jax.Array:
    return _attention_forward(window, interpret, q, k, v, segments)[0]


def _attention_forward(window: int | None, interpret: bool, q: Any, k: Any, v: Any, segments: Any) -> Any:
    shards = _query_shards(window)
    mask = _mask(q.shape[2], k.shape[2], causal=True, window=window)
    kernel = _kernel(mask, q.shape[1] // k.shape[1], interpret, window=window, shards=shards)
    queries, keys, q_ids, k_ids = _specs(shards)
    kernel_spec = None
    if axes := sharding.explicit_axes():
        # The kernel cannot divide a mask over a mesh of which a caller's `shard_map` has some axes.
        mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
        layout = NamedSharding(mesh, P(None, AXIS if shards > 1 else None))
        kernel_spec = kernel.manual_sharding_spec(layout)
    out, log_sum_exp = _on_each_device(
        _forward,
        (kernel_spec, queries, keys, keys, q_ids, k_ids),
        (queries, P(*queries[:3])),
        (kernel, q, k, v, segments, segments),
    )
    out, log_sum_exp = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum_exp, RESIDUALS)
    return out, (q, k, v, segments, out, log_sum_exp)


def _attention_backward(window: int | None, interpret: bool, residuals: Any, d_out: jax.Array) -> Any:
    shards = _query_shards(window)

    def gradients(q: jax.Array, *args: jax.Array) -> Any:
        offset = jax.lax.axis_index(AXIS) * q.shape[2] if shards > 1 else 0
        dq, dk, dv = attention_gradients(
            q, *args, causal=True, window=window, offset=offset, interpret=interpret
        )
        return (dq, *(jax.lax.psum((dk, dv), AXIS) if shards > 1 else (dk, dv)))

    q, k, v, segments, out, log_sum_exp = residuals
    queries, keys, q_ids, k_ids = _specs(shards)
    found = _on_each_device(
        gradients,
        (queries, keys, keys, q_ids, k_ids, queries, P(*queries[:3]), queries),
        (queries, keys, keys),
        (q, k, v, segments, segments, out, log_sum_exp, d_out),
    )
    return *found, None


_attention.defvjp(_attention_forward, _attention_backward)


def _query_shards(window: int | None) -> int:
    """The devices that share a row's queries: with a window, those of `context`."""
    return 1 if window is None else sharding.explicit_axes().get(AXIS, 1)


def _specs(shards: int) -> tuple[P, P, P, P]:
    """Of queries [B, N, T, H], keys [B, K, S, H], and the segments of both."""
    axis = AXIS if shards > 1 else None
    return P(sharding.BATCH, "tensor", axis, None), sharding.CACHE_BKSH, P(sharding.BATCH, axis), _SEGMENTS_BT


def _on_each_device(function: Callable[..., Any], in_specs: Any, out_specs: Any, args: Any) -> Any:
    """`function` over the current mesh, if there is one; an argument that is None has no spec."""
    axes = sharding.explicit_axes()
    if not axes:
        return function(*args)
    fit = functools.partial(sharding.restrict, names=axes)
    in_specs, out_specs = jax.tree.map(fit, (in_specs, out_specs), is_leaf=sharding.is_spec)
    in_specs = tuple(None if arg is None else spec for arg, spec in zip(args, in_specs, strict=True))
    args = jax.tree.map(jax.sharding.reshard, args, in_specs)
    # The results of a Pallas kernel carry no varying axes, so shard_map cannot check them.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


def block_size(length: int, window: int | None = None) -> int:
    """The side of a forward tile: the largest power of two dividing `length` to 1024; from 8192 tokens, 2048.

    With a window shorter than that, up to 1024: of the tiles at both of its ends, half is masked.

    Larger tiles have less overhead (a third of a microsecond each, beside two of products on a v5p core at
    1024) and read keys less often, but half of a tile on the diagonal is masked: at 4096 tokens a ninth of
    the work with tiles of 512, a fifth with 1024, a third with 2048. MaxText's configurations for v6e have
    the same sizes (benchmarks/maxtext_trillium_model_configs.py: Llama 2 at 4096, Llama 3.1 at 8192).
    """
    return math.gcd(length, 2048 if min(length, window or length) >= 8192 else 1024)


def block_sizes(queries: int, keys: int, window: int | None = None) -> kernel_lib.BlockSizes:
    """The tiles of the forward kernel for these numbers of queries and keys.

    Scores are computed 512 keys at a time, so that the softmax of some overlaps with the products of others
    (the default of openxla/tokamax).

    Args:
      queries: T on a device.
      keys: S on a device.
      window: of the layer, or None.
    """
    kv_block = block_size(keys, window)
    return kernel_lib.BlockSizes(
        block_q=block_size(queries, window),
        block_kv=kv_block,
        block_kv_compute=math.gcd(kv_block, COMPUTE_BLOCK),
    )


def _mask(queries: int, keys: int, *, causal: bool, window: int | None = None) -> mask_lib.Mask:
    shape = queries, keys
    if window is not None:
        return mask_lib.LocalMask(shape, (window - 1, 0), 0)
    return mask_lib.CausalMask(shape) if causal else mask_lib.FullMask(shape)


def _kernel(
    mask: mask_lib.Mask, group: int, interpret: bool, *, window: int | None = None, shards: int = 1
) -> Any:
    """The forward kernel with this mask [T, S] for `group` query heads of a key head; `shards` divide T."""
    queries, keys = mask.shape
    return kernel_lib.make_splash_mqa(
        mask_lib.MultiHeadMask([mask] * group),
        block_sizes=block_sizes(queries // shards, keys, window),
        head_shards=1,
        q_seq_shards=shards,
        interpret=interpret,
        save_residuals=True,
    )


def _forward(
    kernel: kernel_lib.SplashAttentionKernel,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array | None,
    k_segments: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The kernel over a batch: [B, N, T, H] by [B, K, S, H] -> [B, N, T, H], log-sum-exp f32 [B, N, T].

    A group of heads is a row of its own: Pallas divides rows among the two cores of a v4 or v5p chip, which
    may have a single sequence.
    """
    segments = None if q_segments is None or k_segments is None else (q_segments, k_segments)

    def group(q: jax.Array, k: jax.Array, v: jax.Array, ids: tuple[jax.Array, jax.Array] | None) -> Any:
        out, (log_sum_exp,) = kernel(q, k, v, ids and kernel_lib.SegmentIds(*ids))
        return out, log_sum_exp

    batch, kv_heads = k.shape[:2]
    row = jax.vmap(group, in_axes=(0, 0, 0, None))
    found = jax.vmap(row)(q.reshape(batch, kv_heads, -1, *q.shape[2:]), k, v, segments)
    return tuple(x.reshape(*q.shape[:2], *x.shape[3:]) for x in found)


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
    kernel = _kernel(_mask(q.shape[2], k.shape[2], causal=causal), q.shape[1] // k.shape[1], interpret)
    return _forward(kernel, q, k, v, q_segments, k_segments)
