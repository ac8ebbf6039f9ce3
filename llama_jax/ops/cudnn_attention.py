"""Causal attention by cuDNN's flash kernels for NVIDIA GPUs, with segments, groups and meshes.

`jax.nn.dot_product_attention(implementation="cudnn")`: the kernels compute scores tile by tile in both
passes, keep the output and its log-sum-exp for the backward pass (FlashAttention, arXiv 2205.14135), and read
the keys and values of a group as they are, not repeated.

Rows of one segment need no mask in memory. Packed rows get theirs as a bias [B, 1, T, T], which all heads and
layers share; the kernels skip what is after the diagonal either way. cuDNN could also be told where each
segment starts, and would then neither read nor compute anything between segments; but JAX has no public
argument for that, needs the greatest number of segments at compile time, keeps one log-sum-exp per segment
and row, and in JAX 0.10 its offsets of grouped keys are wrong.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding

from llama_jax import sharding
from llama_jax.errors import ConfigError
from llama_jax.ops import spmd

FORWARD_PRIMITIVE = "dot_product_attention_fwd_wrapper"  # private: tests/test_private_seams.py

MAX_MASK_BYTES = 2 << 30
"""The largest mask of packed rows, per device; there are two in the backward pass of JAX 0.10."""

MIN_COMPUTE_CAPABILITY = (8, 0)
"""Ampere: the first with flash attention in cuDNN (its documentation of fused attention)."""

DTYPES = (jnp.bfloat16, jnp.float16)

_SEGMENTS_BS = P(sharding.BATCH, None)


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None = None,
    *,
    window: int | None = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, causal in the order of the row, within segments.

    Scores and softmax are f32. On a mesh each device runs the kernel on its own batch rows and heads;
    `context` shards the queries, and each device reads all keys, under a mask [T / context, T].

    Args:
      q: bf16 or f16 [B, T, N, H].
      k: [B, K, T, H], head-major; K divides N.
      v: [B, K, T, H].
      segment_ids: int [B, T]; a query attends only to keys of its own segment. None: each row is one segment.
      window: the number of keys up to its own that a query attends to; None for all. The kernel skips the
        keys before it in rows of one segment that are whole on a device; elsewhere they are masked.
      implementation: of the same call; `xla` computes all scores, on any platform and in any dtype.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ConfigError: if the numbers of keys and queries differ, or cuDNN refuses shape, dtype or device.
    """
    if k.shape[2] != q.shape[1]:
        raise ConfigError(
            f"cudnn attention needs as many keys as queries and got {k.shape[2]} and {q.shape[1]}; "
            "use the xla or blockwise backend with a cache"
        )

    def local(q: jax.Array, k: jax.Array, v: jax.Array, q_ids: Any, k_ids: Any) -> jax.Array:
        queries, keys = q.shape[1], k.shape[2]
        allowed, order = None, jnp.arange(queries)
        if queries != keys:
            order = jax.lax.axis_index("context") * queries + order
            allowed = (jnp.arange(keys) <= order[:, None])[None, None]
        # The kernels take a mask or a window.
        local_window = None if window is None else (window - 1, 0)
        if window is not None and (queries != keys or q_ids is not None):
            near = (jnp.arange(keys) > order[:, None] - window)[None, None]
            allowed, local_window = near if allowed is None else allowed & near, None
        if q_ids is not None:
            same = (k_ids[:, None, :] == q_ids[:, :, None])[:, None]
            allowed = same if allowed is None else allowed & same
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        try:
            return jax.nn.dot_product_attention(
                q,
                k,
                v,
                mask=allowed,
                is_causal=queries == keys,
                local_window_size=local_window,
                implementation=implementation,
            )
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"cuDNN refuses attention of {q.shape[2]} heads x {q.shape[3]} in {q.dtype.name} over {keys} "
                f"tokens: {_first_line(error)}; use the xla or blockwise backend"
            ) from None

    ids = None if segment_ids is None else sharding.TOKENS_BT, None if segment_ids is None else _SEGMENTS_BS
    in_specs = (sharding.ACT_BTNH, sharding.CACHE_BKSH, sharding.CACHE_BKSH, *ids)
    return spmd.shard_map_or_call(local, in_specs, sharding.ACT_BTNH)(q, k, v, segment_ids, segment_ids)


def refusal(
    *,
    batch: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: jnp.dtype,
    shards: int = 1,
    device: Any = None,
) -> str | None:
    """Why cuDNN cannot compute attention of packed rows and its gradient on a device; None if it can.

    JAX and cuDNN are asked: the call is traced, and compiled where the device is in this process, which finds
    out what no list knows (seconds; the compilation cache keeps it).

    Args:
      batch: rows per device.
      length: T.
      heads: N per device.
      kv_heads: K per device.
      head_dim: H.
      dtype: of queries, keys and values.
      shards: the size of mesh axis `context`, which shards the queries.
      device: an NVIDIA GPU; None asks only what can be asked without one.

    Returns:
      A phrase for "cuDNN attention is not used: ...".
    """
    if dtype not in DTYPES:
        return f"its dtypes are bfloat16 and float16, and attention is computed in {dtype.name}"
    mask = batch * (length // shards) * length * dtype.itemsize
    if mask > MAX_MASK_BYTES:
        return (
            f"the mask of {batch} packed rows of {length} tokens has {mask / 1e9:.1f} GB on each device, "
            f"more than {MAX_MASK_BYTES / 1e9:.1f} GB"
        )
    capability = getattr(device, "compute_capability", None)
    if capability is not None and _version(capability) < MIN_COMPUTE_CAPABILITY:
        return f"{device.device_kind} has compute capability {capability}; flash attention needs 8.0 (Ampere)"

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array) -> jax.Array:
        out = jax.nn.dot_product_attention(
            q, k, v, mask=allowed, is_causal=shards == 1, implementation="cudnn"
        )
        return out.astype(jnp.float32).sum()

    is_here = device in jax.local_devices()
    layout = SingleDeviceSharding(device) if is_here else None
    queries = jax.ShapeDtypeStruct((batch, length // shards, heads, head_dim), dtype, sharding=layout)
    keys = jax.ShapeDtypeStruct((batch, length, kv_heads, head_dim), dtype, sharding=layout)
    allowed = jax.ShapeDtypeStruct((batch, 1, length // shards, length), jnp.bool_, sharding=layout)
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    try:
        traced = gradient.trace(queries, keys, keys, allowed)
        if is_here:
            traced.lower().compile()
    except Exception as error:  # of JAX, XLA and cuDNN, which share no type
        return _first_line(error)
    return None


def saves_residuals(primitive: Any, *_: Any, **params: Any) -> bool:
    """A rematerialization policy that keeps the forward kernel's results, which have no checkpoint name."""
    return primitive.name == FORWARD_PRIMITIVE


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return text[:200] or type(error).__name__


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
