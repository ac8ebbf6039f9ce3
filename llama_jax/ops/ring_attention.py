"""Causal attention for training over the mesh axis `context`: ring attention (arXiv 2310.01889).

Queries stay where they are; keys and values travel from device to device around a ring, in the backward pass
together with their gradients, while each device computes attention to those that it has. A device then never
has more than two shards of keys. Rows are in zig-zag order (`ops.zigzag`), in which every step of the ring is
the same work on every device, without a mask but for segments: queries of both chunks read the first chunk of
an earlier device, or queries of the second chunk read both chunks of a later one.

The products are those of the splash kernels on TPU, and of `blockwise_attention` elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.ops import blockwise_attention, zigzag
from llama_jax.ops.splash_attention import RESIDUALS
from llama_jax.ops.splash_forward import attention_forward
from llama_jax.ops.splash_gradient import attention_gradients
from llama_jax.ops.splash_tiles import LANES
from llama_jax.ops.zigzag import AXIS

Segments = jax.Array | None

_HEADS_BNTH = P(sharding.BATCH, "tensor", AXIS, None)
_LOG_SUM_EXP_BNT = P(sharding.BATCH, "tensor", AXIS)


class Partial(NamedTuple):
    """Attention to some of the keys, which can be merged with that to others.

    Attributes:
      out: [B, N, T, H], softmax over these keys times their values.
      log_sum_exp: f32 [B, N, T], of the scores of these keys; a large negative number for a query that reads
        none of them, whose `out` is finite.
    """

    out: jax.Array
    log_sum_exp: jax.Array


def merge(a: Partial, b: Partial) -> Partial:
    """Attention to the keys of both, in f32."""
    log_sum_exp = jnp.logaddexp(a.log_sum_exp, b.log_sum_exp)
    of_a, of_b = (x.out * jnp.exp(x.log_sum_exp - log_sum_exp)[..., None] for x in (a, b))
    return Partial(of_a + of_b, log_sum_exp)


class Kernel(NamedTuple):
    """Attention of one device's queries to one device's keys.

    Attributes:
      forward: (q [B, N, T, H], k [B, K, S, H], v, segments of queries int [B, T] and of keys, causal) ->
        the fields of a `Partial`.
      backward: (the same, out, log_sum_exp, d_out, causal) -> (dq, dk, dv), where out and log_sum_exp are of
        all keys that the queries read.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: Segments = None,
    *,
    backend: Literal["splash", "blockwise"],
    interpret: bool = False,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v, causal in the order of the row, within segments.

    Rows are in zig-zag order over the mesh axis `context`, which shards queries, keys and values.

    Args:
      q: [B, T, N, H].
      k: [B, K, T, H], head-major; K divides N.
      v: [B, K, T, H].
      segment_ids: int [B, T]; a query attends only to keys of its own segment. None: each row is one segment.
      backend: the kernel for TPU, or the form for other platforms.
      interpret: run the TPU's kernel in Pallas's interpret mode: slow, on any backend.

    Returns:
      [B, T, N, H] in q's dtype. The backward pass keeps q, k, v and two arrays named `RESIDUALS`.

    Raises:
      ConfigError: if the mesh does not divide the length into chunks, which for `splash` are multiples of 128
        tokens.
    """
    zigzag.check_length(q.shape[1], LANES if backend == "splash" else 1)
    q = q.transpose(0, 2, 1, 3)
    return _attention(backend, interpret, q, k, v, segment_ids).transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(backend: str, interpret: bool, q: jax.Array, k: Any, v: Any, segments: Segments) -> jax.Array:
    return _attention_forward(backend, interpret, q, k, v, segments)[0]


def _attention_forward(backend: str, interpret: bool, q: Any, k: Any, v: Any, segments: Segments) -> Any:
    ring = functools.partial(_ring_forward, _kernel(backend, interpret), zigzag.shards())
    out, log_sum_exp = _on_each_device(ring, (_HEADS_BNTH, _LOG_SUM_EXP_BNT), q, k, v, segments)
    out, log_sum_exp = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum_exp, RESIDUALS)
    return out, (q, k, v, segments, out, log_sum_exp)


def _attention_backward(backend: str, interpret: bool, residuals: Any, d_out: jax.Array) -> Any:
    ring = functools.partial(_ring_backward, _kernel(backend, interpret), zigzag.shards())
    return *_on_each_device(ring, (_HEADS_BNTH,) * 3, *residuals, d_out), None


_attention.defvjp(_attention_forward, _attention_backward)


def _on_each_device(ring: Callable[..., Any], out_specs: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    """`ring` over the current mesh; of `rest`, segments are [B, T] and log-sum-exps [B, N, T]."""
    specs = {2: sharding.TOKENS_BT, 3: _LOG_SUM_EXP_BNT, 4: _HEADS_BNTH}
    fit = functools.partial(sharding.restrict, names=sharding.explicit_axes())
    args = (q, k, v, *rest)
    in_specs = jax.tree.map(lambda x: fit(specs[x.ndim]), args)
    args = jax.tree.map(jax.sharding.reshard, args, in_specs)
    out_specs = tuple(map(fit, out_specs))
    # The results of a Pallas kernel carry no varying axes, so shard_map cannot check them.
    return jax.shard_map(ring, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*args)


def _pass_on(tree: Any, count: int) -> Any:
    """Sends arrays to the next device of the ring, and receives those of the one before."""
    to_next = [(i, (i + 1) % count) for i in range(count)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, to_next), tree)


def _halves(x: Any, axis: int) -> list[Any]:
    """The two chunks of an array; of None, None twice."""
    return [None, None] if x is None else jnp.split(x, 2, axis)


def _ring_forward(kernel: Kernel, count: int, q: jax.Array, k: jax.Array, v: jax.Array, segments: Any) -> Any:
    """One device's part of the forward pass: (out in q's dtype, log-sum-exp)."""
    place = jax.lax.axis_index(AXIS)
    dtype = q.dtype

    def attend(step: Any, total: Partial, travelling: Any) -> Partial:
        """Adds attention to the keys of the device `step` places before this one in the ring."""
        k, v, k_segments = travelling
        (k1, _), (v1, _), (ids1, _) = _halves(k, 2), _halves(v, 2), _halves(k_segments, 1)

        def of_earlier(total: Partial) -> Partial:
            return merge(total, Partial(*kernel.forward(q, k1, v1, segments, ids1, causal=False)))

        def of_later(total: Partial) -> Partial:
            (_, q2), (_, ids2) = _halves(q, 2), _halves(segments, 1)
            first, second = zip(*(_halves(x, 2) for x in total), strict=True)
            part = kernel.forward(q2, k, v, ids2, k_segments, causal=False)
            second = merge(Partial(*second), Partial(*part))
            return Partial(*(jnp.concatenate(x, 2) for x in zip(first, second, strict=True)))

        return jax.lax.cond(step <= place, of_earlier, of_later, total)

    def advance(step: jax.Array, state: Any) -> Any:
        total, travelling = state
        ahead = _pass_on(travelling, count)  # travels while the kernel computes
        return attend(step, total, travelling), ahead

    ahead = _pass_on((k, v, segments), count)
    out, log_sum_exp = kernel.forward(q, k, v, segments, segments, causal=True)
    state = Partial(out.astype(jnp.float32), log_sum_exp), ahead
    total = attend(count - 1, *jax.lax.fori_loop(1, count - 1, advance, state))
    return total.out.astype(dtype), total.log_sum_exp


def _ring_backward(
    kernel: Kernel,
    count: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Any,
    out: jax.Array,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
) -> Any:
    """One device's part of the backward pass: (dq, dk, dv) in the dtypes of q, k and v."""
    place = jax.lax.axis_index(AXIS)

    def gradients(step: Any, travelling: Any) -> Any:
        """(dq, dk, dv) from the keys of the device `step` places before this one in the ring."""
        k, v, k_segments = travelling

        def of_earlier() -> Any:
            (k1, _), (v1, _), (ids1, _) = _halves(k, 2), _halves(v, 2), _halves(k_segments, 1)
            results = (out, log_sum_exp, d_out)
            dq, dk1, dv1 = kernel.backward(q, k1, v1, segments, ids1, *results, causal=False)
            return dq, *(jnp.concatenate([d, jnp.zeros_like(d)], 2) for d in (dk1, dv1))

        def of_later() -> Any:
            q2, *results = (_halves(x, 2)[1] for x in (q, out, log_sum_exp, d_out))
            ids2 = _halves(segments, 1)[1]
            dq2, dk, dv = kernel.backward(q2, k, v, ids2, k_segments, *results, causal=False)
            return jnp.concatenate([jnp.zeros_like(dq2), dq2], 2), dk, dv

        return jax.lax.cond(step <= place, of_earlier, of_later)

    def add(sums: Any, parts: Any) -> Any:
        return jax.tree.map(lambda total, part: total + part.astype(jnp.float32), sums, parts)

    def advance(step: Any, state: Any) -> Any:
        dq, dkv, travelling = state
        # Both travel while the kernel computes: the gradients of these keys are added to those that arrive.
        ahead, dkv = _pass_on((travelling, dkv), count)
        part, *parts = gradients(step, travelling)
        return add(dq, part), add(dkv, tuple(parts)), ahead

    ahead = _pass_on((k, v, segments), count)
    first = kernel.backward(q, k, v, segments, segments, out, log_sum_exp, d_out, causal=True)
    dq, dk, dv = (d.astype(jnp.float32) for d in first)
    dq, dkv, travelling = jax.lax.fori_loop(1, count - 1, advance, (dq, (dk, dv), ahead))
    dkv = _pass_on(dkv, count)
    part, *parts = gradients(count - 1, travelling)
    dk, dv = _pass_on(add(dkv, tuple(parts)), count)  # to the device that they are of
    return add(dq, part).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _kernel(backend: str, interpret: bool) -> Kernel:
    if backend == "blockwise":
        return Kernel(blockwise_attention.partial_attention, blockwise_attention.partial_gradients)

    def forward(q: jax.Array, *args: Any, causal: bool) -> tuple[jax.Array, jax.Array]:
        out, log_sum_exp = attention_forward(q.swapaxes(1, 2), *args, causal=causal, interpret=interpret)
        return out.swapaxes(1, 2), log_sum_exp

    def backward(
        q: Any, k: Any, v: Any, ids: Any, k_ids: Any, out: Any, log_sum_exp: Any, d_out: Any, *, causal: bool
    ) -> Any:
        q, out, d_out = (x.swapaxes(1, 2) for x in (q, out, d_out))
        args = (q, k, v, ids, k_ids, out, log_sum_exp, d_out)
        dq, dk, dv = attention_gradients(*args, causal=causal, interpret=interpret)
        return dq.swapaxes(1, 2), dk, dv

    return Kernel(forward, backward)
