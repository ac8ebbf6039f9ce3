"""Causal attention for training on TPU: Pallas kernels, with segments, groups and meshes.

The kernels (`ops.splash_forward`, `ops.splash_gradient`) compute only tiles that the mask does not exclude;
what the backward pass needs is the output and its log-sum-exp (FlashAttention, arXiv 2205.14135). Keys and
values are not repeated: each query head reads those of its group. The name is that of JAX's kernels, which
these replace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import ConfigError
from llama_jax.ops.splash_forward import attention_forward
from llama_jax.ops.splash_gradient import attention_gradients
from llama_jax.ops.splash_tiles import LANES

RESIDUALS = "splash_residuals"
"""The checkpoint name of what the backward kernel reads besides q, k and v."""

AXIS = "context"


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
    tensor = sharding.explicit_axes().get("tensor", 1)
    if heads % tensor or k.shape[1] % tensor:
        raise ConfigError(
            f"splash attention: {heads} query and {k.shape[1]} key/value heads do not divide over mesh axis "
            f"tensor of size {tensor}"
        )
    # Padding at the end, which the causal mask excludes for all other queries.
    if pad := -length % (LANES * _query_shards(window)):
        q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
        k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0))) for x in (k, v))
        segment_ids = None if segment_ids is None else jnp.pad(segment_ids, ((0, 0), (0, pad)))
    # Here, so that their gradients are laid out as they are.
    queries, keys, *_ = _specs(_query_shards(window))
    q, k, v = (sharding.constrain(x, spec) for x, spec in ((q, queries), (k, keys), (v, keys)))
    out = _attention(window, interpret, q, k, v, segment_ids)
    return out[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    window: int | None, interpret: bool, q: jax.Array, k: Any, v: Any, segments: jax.Array | None
) -> jax.Array:
    return _attention_forward(window, interpret, q, k, v, segments)[0]


def _attention_forward(window: int | None, interpret: bool, q: Any, k: Any, v: Any, segments: Any) -> Any:
    shards = _query_shards(window)
    queries, keys, q_ids, k_ids = _specs(shards)
    out, log_sum_exp = _on_each_device(
        _at_its_place(attention_forward, window, interpret, shards),
        (queries, keys, keys, q_ids, k_ids),
        (queries, _log_sum_exp(queries)),
        (q, k, v, segments, segments),
    )
    out, log_sum_exp = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum_exp, RESIDUALS)
    return out, (q, k, v, segments, out, log_sum_exp)


def _attention_backward(window: int | None, interpret: bool, residuals: Any, d_out: jax.Array) -> Any:
    shards = _query_shards(window)
    local = _at_its_place(attention_gradients, window, interpret, shards)

    def gradients(*args: jax.Array) -> Any:
        dq, dk, dv = local(*args)
        return (dq, *(jax.lax.psum((dk, dv), AXIS) if shards > 1 else (dk, dv)))

    q, k, v, segments, out, log_sum_exp = residuals
    queries, keys, q_ids, k_ids = _specs(shards)
    found = _on_each_device(
        gradients,
        (queries, keys, keys, q_ids, k_ids, queries, _log_sum_exp(queries), queries),
        (queries, keys, keys),
        (q, k, v, segments, segments, out, log_sum_exp, d_out),
    )
    return *found, None


_attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def on_one_device(
    options: tuple[tuple[str, Any], ...], q: jax.Array, k: Any, v: Any, q_segments: Any, k_segments: Any
) -> jax.Array:
    """`attention_forward`, causal, with its gradient; `options` are its keyword arguments."""
    return _on_one_device_forward(options, q, k, v, q_segments, k_segments)[0]


def _on_one_device_forward(options: Any, *args: Any) -> Any:
    found = attention_forward(*args, causal=True, **dict(options))
    out, log_sum_exp = (checkpoint_name(x, RESIDUALS) for x in found)
    return out, (*args, out, log_sum_exp)


def _on_one_device_backward(options: Any, residuals: Any, d_out: jax.Array) -> Any:
    gradients: Any = functools.partial(attention_gradients, causal=True, **dict(options))
    return *gradients(*residuals, d_out), None, None


on_one_device.defvjp(_on_one_device_forward, _on_one_device_backward)


def _at_its_place(
    kernel: Callable[..., Any], window: int | None, interpret: bool, shards: int
) -> Callable[..., Any]:
    """A kernel of causal attention for a device's queries, which are one of `shards` parts of each row."""

    def local(q: jax.Array, *args: Any) -> Any:
        offset = jax.lax.axis_index(AXIS) * q.shape[1] if shards > 1 else 0
        return kernel(q, *args, causal=True, window=window, offset=offset, interpret=interpret)

    return local


def _query_shards(window: int | None) -> int:
    """The devices that share a row's queries: with a window, those of `context`."""
    return 1 if window is None else sharding.explicit_axes().get(AXIS, 1)


def _specs(shards: int) -> tuple[P, P, P, P]:
    """Of queries [B, T, N, H], keys [B, K, S, H], and the segments of both."""
    axis = AXIS if shards > 1 else None
    queries, ids = P(sharding.BATCH, axis, "tensor", None), P(sharding.BATCH, axis)
    return queries, sharding.CACHE_BKSH, ids, P(sharding.BATCH, None)


def _log_sum_exp(queries: P) -> P:
    """Of the log-sum-exp [B, N, T] of queries [B, T, N, H]."""
    return P(queries[0], queries[2], queries[1])


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
