"""Causal grouped-query attention on arrays (arXiv 1706.03762, 2305.13245), with several backends.

`xla` computes all scores of a layer at once. `blockwise` (after FlashAttention, arXiv 2205.14135) computes
them in [block, block] tiles in both passes, and keeps the output and its log-sum-exp for the backward pass.
`splash` does the same in Pallas kernels for TPU, and `cudnn` in cuDNN's for NVIDIA GPUs. Over the mesh
axis `context`, keys travel in a ring with `blockwise` and `splash` (`ops.ring_attention`), or with a sliding
window come from the neighbors that it reaches (`ops.window_exchange`). With the others they are gathered, and
in full layers of models that have windows.

With a window of w (Mistral 7B, arXiv 2310.06825) a query at position i attends to keys at j, i - w < j <= i.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.errors import ConfigError
from llama_jax.kv_cache import EightBits, Layer, Layout
from llama_jax.ops import ring_cache, spmd, striped_cache, zigzag
from llama_jax.ops.blockwise_attention import MASKED, sharded_blockwise_attention
from llama_jax.ops.cudnn_attention import cudnn_attention
from llama_jax.ops.layouts import slice_slots
from llama_jax.ops.products import dot, query_key_product
from llama_jax.ops.striped_cache import Partial
from llama_jax.taps import Tapping, tap_weights

Backend = Literal["xla", "blockwise", "splash", "cudnn"]
# Keys `k` and values `v` [K, P, H] of the P positions before a row: the parameters of prefix tuning (arXiv
# 2101.00190). Every query attends to them, or with a window to those that it reaches.
KeyValues = Mapping[str, jax.Array]


class AttentionMask(NamedTuple):
    """Which keys each query attends to, from their positions and segments.

    A query attends to the keys of its own segment at its own position and before. A key that no query may
    attend to (padding) has a segment of its own, or a position after every query.

    Attributes:
      q_positions: int [B, T].
      k_positions: int [B, S].
      q_segments: int [B, T], or None where each row is one segment.
      k_segments: int [B, S], or None.
      allowed: bool [B, T, S], which replaces the rule above (for several beams in one row, for example). Of
        the positions then only those of queries count, for the window's reach into a prefix.
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    allowed: jax.Array | None = None

    def as_array(self, window: int | None = None) -> jax.Array:
        """bool [B, 1, 1, T, S]; True where the query attends to the key.

        With a `window`, to keys of that many positions up to its own; `allowed` is as it is (`cache_mask`).
        """
        if self.allowed is not None:
            return self.allowed[:, None, None]
        allowed = self.k_positions[:, None, :] <= self.q_positions[:, :, None]
        if window is not None:
            allowed &= self.q_positions[:, :, None] - self.k_positions[:, None, :] < window
        if self.q_segments is not None and self.k_segments is not None:
            allowed &= self.k_segments[:, None, :] == self.q_segments[:, :, None]
        return allowed[:, None, None]


def cache_mask(
    order: jax.Array,
    layout: Layout,
    end: jax.Array | None,
    positions: jax.Array,
    allowed: jax.Array | None = None,
) -> AttentionMask:
    """The mask of new tokens and one layer's cache, into which their keys are already written.

    Args:
      order: int [B, T], the positions of the new tokens; with `allowed`, their slots.
      layout: of the layer.
      end: int [B], the number of tokens in each row, after which there is padding; or None.
      positions: int [B, T], with `allowed`: the positions of the new tokens.
      allowed: bool [B, T, S], the slots that each attends to, in the order of its sequence. Of these a window
        leaves the last ones.
    """
    if allowed is not None and layout.window is not None:
        count = jax.lax.cumsum(allowed.astype(jnp.int32), axis=2, reverse=True)
        allowed = allowed & (count <= layout.window)
    at = jnp.arange(layout.slots, dtype=jnp.int32)
    if layout.ring:
        written = order[:, -1] + 1
        return AttentionMask(
            order, ring_cache.positions(written if end is None else jnp.minimum(written, end), at)
        )
    at = jnp.broadcast_to(at, (order.shape[0], layout.slots))
    return AttentionMask(order if allowed is None else positions, at, allowed=allowed)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: AttentionMask,
    prefix: KeyValues | None = None,
    *,
    window: int | None = None,
    backend: Backend = "xla",
    block_size: int = 512,
    ring: bool = False,
    in_order: bool = False,
    tap: Tapping | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H) + mask) v; query head n reads key/value head n // (N / K).

    Scores and softmax are f32. Every query must attend to at least one key (in causal attention its own);
    otherwise its output is the average of all values.

    Args:
      q: [B, T, N, H].
      k: [B, K, S, H], head-major as in the cache; K divides N.
      v: [B, K, S, H].
      mask: positions and segments of queries and keys.
      prefix: keys and values of the positions before every row; not with `splash` or `cudnn`.
      window: the number of positions up to its own whose keys a query attends to; None for all.
      backend: `xla`; `blockwise`, whose memory does not grow with T x S; or, where queries and keys are of
        the same tokens in order (no cache), `splash` on TPU and `cudnn` on NVIDIA GPUs.
      block_size: the side of a `blockwise` tile.
      ring: keys travel over the mesh axis `context`, as `uses_ring` tells; rows are in zig-zag order. Never
        with a window.
      in_order: queries and keys are of the same tokens, at the positions of the row: of keys that `context`
        divides, devices then receive those that a window reaches.
      tap: with `xla` it gets the weights, at the site `block.attention_weights`, and returns those to use.

    Returns:
      [B, T, N, H] in q's dtype.

    Raises:
      ConfigError: for an unknown backend, a prefix with `splash` or `cudnn`, or with a window in packed rows,
        a window with `ring`, or what `cudnn` refuses.
    """
    if backend not in get_args(Backend):
        raise ConfigError(
            f"attention backend {backend!r} is unknown; use one of {', '.join(get_args(Backend))}"
        )
    if backend in ("splash", "cudnn") and prefix is not None:
        raise ConfigError(f"attention backend {backend!r} takes no prefix; use 'blockwise'")
    if prefix is not None and window is not None and mask.q_segments is not None:
        raise ConfigError(
            f"a prefix and a sliding window of {window} in packed rows: how far the window reaches into the "
            "prefix depends on the document; use rows of one document or no longer than the window, or LoRA"
        )
    if ring and window is not None:
        raise ConfigError("ring attention takes no window; keys of such models are gathered over context")
    # Pallas, a fifth of a second of imports, only where it is used.
    if ring and (backend == "splash" or backend == "blockwise"):
        from llama_jax.ops.ring_attention import ring_attention

        return ring_attention(q, k, v, mask.q_segments, backend=backend)
    divided = in_order and prefix is None and zigzag.shards() > 1
    if divided and window is not None and (backend == "splash" or backend == "blockwise"):
        from llama_jax.ops.window_exchange import received_keys, window_attention

        if received_keys(q.shape[1], window, backend) is not None:
            return window_attention(
                q, k, v, mask.q_segments, window=window, backend=backend, block_size=block_size
            )
    k, v = (sharding.constrain(x, sharding.CACHE_BKSH) for x in (k, v))
    if backend == "splash":
        from llama_jax.ops.splash_attention import splash_attention

        return splash_attention(q, k, v, mask.q_segments, window=window)
    if backend == "cudnn":
        return cudnn_attention(q, k, v, mask.q_segments, window=window)
    grouped = _grouped(q, k.shape[1])
    k_segments = None if mask.k_segments is None else _gather_context(mask.k_segments)
    mask = mask._replace(k_positions=_gather_context(mask.k_positions), k_segments=k_segments)
    if backend == "blockwise":
        queries = mask.q_positions, mask.q_segments
        keys = mask.k_positions, mask.k_segments
        out = sharded_blockwise_attention(
            grouped, k, v, queries, keys, prefix, block_size=block_size, window=window
        )
    else:
        out = checkpoint_name(_xla(grouped, k, v, mask, prefix, window, tap), "attention_out")
    return _ungrouped(out, q)


def uses_ring(backend: Backend, *, prefix: bool, window: bool = False) -> bool:
    """Whether keys travel over the mesh axis `context`: then rows must be in zig-zag order (`ops.zigzag`).

    Not where there is a prefix, or a layer with a window.
    """
    return backend in ("splash", "blockwise") and not (prefix or window) and zigzag.shards() > 1


def cached_attention(
    q: jax.Array,
    k: Layer,
    v: Layer,
    mask: AttentionMask,
    prefix: KeyValues | None = None,
    *,
    used: jax.Array | None = None,
    window: int | None = None,
    block_size: int = 256,
    tap: Tapping | None = None,
) -> jax.Array:
    """`attention` to one layer of a key/value cache, of any cache dtype.

    Slots that `context` divides are read where they are (`ops.striped_cache`).

    Args:
      q: [B, T, N, H].
      k: [B, K, S, H], or 8 bits with their scales; where there are more rows, the first are read.
      v: likewise.
      mask: positions of queries and cache slots, or the slots that each query attends to.
      prefix: keys and values outside the cache, of the positions before every row.
      used: int [], the number of slots that are written. With it, only those are read, in blocks: for many
        queries. Without it, all scores are computed at once, which is faster for a few queries.
      window: the number of positions up to its own whose keys a query attends to; None for all.
      block_size: slots per block.
      tap: as for `attention`; the weights have a column for each slot. All scores are computed at once.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    grouped = _grouped(q, jax.tree.leaves(k)[0].shape[1])
    mask = mask._replace(k_positions=_gather_context(mask.k_positions))
    if striped_cache.shards() > 1:
        first = functools.partial(_first_partial, window=window)
        add_slots = functools.partial(_add_slots, window=window, block_size=block_size)
        out = striped_cache.attend(first, add_slots, grouped, k, v, mask, prefix, used)
        return _ungrouped(out, q)
    slots = mask.k_positions.shape[1]
    if used is not None and window is not None:
        used = jnp.minimum(used, slots)  # of a ring
    if used is None or slots <= block_size or tap is not None:
        k, v = jax.tree.map(lambda x: x[: len(q)] if len(x) > len(q) else x, (k, v))
        return _ungrouped(_xla(grouped, k, v, mask, prefix, window, tap), q)
    return _ungrouped(_in_blocks(grouped, k, v, mask, prefix, used, window, block_size), q)


def _grouped(q: jax.Array, kv_heads: int) -> jax.Array:
    """[B, T, N, H] -> [B, K, G, T, H]: query heads grouped by the key/value head that they share."""
    batch, length, heads, head_dim = q.shape
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).transpose(0, 2, 3, 1, 4)
    # A reshape may lose the sharding of dimensions of size one.
    return sharding.constrain(grouped, sharding.QUERIES_BKGTH)


def _ungrouped(out: jax.Array, like: jax.Array) -> jax.Array:
    return out.transpose(0, 3, 1, 2, 4).reshape(like.shape).astype(like.dtype)


def _xla(
    q: jax.Array,
    k: Layer,
    v: Layer,
    mask: AttentionMask,
    prefix: KeyValues | None,
    window: int | None,
    tap: Tapping | None = None,
) -> jax.Array:
    """[B, K, G, T, H] by [B, K, S, H] -> [B, K, G, T, H], all scores at once."""
    scores = _scores(q, k, mask.as_array(window))
    if prefix is None and tap is not None:
        return _weighted_values(tap_weights(tap, jax.nn.softmax(scores, axis=-1)), v, q.dtype).astype(q.dtype)
    if prefix is None:
        # The output [T, H] is normalized, rather than the weights [T, S].
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        return (_weighted_values(weights, v, q.dtype) / weights.sum(-1, keepdims=True)).astype(q.dtype)
    # Scores are concatenated, not keys: that would copy the cache at every token.
    prefix_scores = _prefix_scores(q, prefix, mask, window)
    weights = jax.nn.softmax(jnp.concatenate([prefix_scores, scores], axis=-1), axis=-1)
    weights = weights if tap is None else tap_weights(tap, weights)
    length = prefix_scores.shape[-1]
    out = _weighted_values(weights[..., length:], v, q.dtype)
    return (out + _prefix_weighted_values(weights[..., :length], prefix, q.dtype)).astype(q.dtype)


def _prefix_scores(q: jax.Array, prefix: KeyValues, mask: AttentionMask, window: int | None) -> jax.Array:
    """f32 [B, K, G, T, P], scaled, and masked where a window does not reach."""
    keys = sharding.constrain(prefix["k"].astype(q.dtype), sharding.PREFIX_KPH)
    scores = dot("bkgth,kph->bkgtp", q, keys) / math.sqrt(q.shape[-1])
    if window is None:
        return scores
    reached = mask.q_positions[:, :, None] - jnp.arange(-keys.shape[1], 0) < window
    return jnp.where(reached[:, None, None], scores, MASKED)


def _prefix_weighted_values(weights: jax.Array, prefix: KeyValues, dtype: jnp.dtype) -> jax.Array:
    """Weights f32 [B, K, G, T, P] times the values of the prefix: f32 [B, K, G, T, H]."""
    values = sharding.constrain(prefix["v"].astype(dtype), sharding.PREFIX_KPH)
    return dot("bkgtp,kph->bkgth", weights.astype(dtype), values)


def _scores(q: jax.Array, k: Layer, mask: jax.Array) -> jax.Array:
    """f32 [B, K, G, T, S], scaled and masked."""
    keys = k.unscaled(q.dtype) if isinstance(k, EightBits) else k.astype(q.dtype)
    scores = query_key_product(q, keys)
    if isinstance(k, EightBits):
        scores = scores * k.scale[:, :, None, None]
    return jnp.where(mask, scores / math.sqrt(q.shape[-1]), MASKED)


def _weighted_values(weights: jax.Array, v: Layer, dtype: jnp.dtype) -> jax.Array:
    """Weights f32 [B, K, G, T, S] times values: f32 [B, K, G, T, H]."""
    if isinstance(v, EightBits):
        weights, v = weights * v.scale[:, :, None, None], v.unscaled(dtype)
    return dot("bkgts,bksh->bkgth", weights.astype(dtype), v.astype(dtype))


def _in_blocks(
    q: jax.Array,
    k: Layer,
    v: Layer,
    mask: AttentionMask,
    prefix: KeyValues | None,
    used: jax.Array,
    window: int | None,
    block_size: int,
) -> jax.Array:
    """`_xla` over the first `used` slots, block by block (the online softmax of FlashAttention)."""
    first = _first_partial(q, prefix, mask, window=window)
    _, total, out = _add_slots(first, q, k, v, mask, used, window=window, block_size=block_size)
    if window is not None:  # padding, of which a ring has no keys, may attend to none
        total = jnp.where(total > 0, total, 1.0)
    return (out / total[..., None]).astype(q.dtype)


def _first_partial(
    q: jax.Array, prefix: KeyValues | None, mask: AttentionMask, *, window: int | None
) -> Partial:
    """The partial result of queries that have attended to the prefix alone, or to nothing."""
    # Derived from q, whose sharding they have.
    out = jnp.zeros_like(q, jnp.float32)
    if prefix is None:
        return jnp.full_like(out[..., 0], MASKED), out[..., 0], out
    prefix_scores = _prefix_scores(q, prefix, mask, window)
    row_max = prefix_scores.max(-1)
    weights = jnp.exp(prefix_scores - row_max[..., None])
    if window is not None:
        weights = jnp.where(prefix_scores > MASKED, weights, 0.0)
    return row_max, weights.sum(-1), _prefix_weighted_values(weights, prefix, q.dtype)


def _add_slots(
    partial: Partial,
    q: jax.Array,
    k: Layer,
    v: Layer,
    mask: AttentionMask,
    used: jax.Array | None,
    *,
    window: int | None,
    block_size: int,
) -> Partial:
    """Adds the first `used` slots block by block, or all at once where it is None or they are one block."""
    slots = mask.k_positions.shape[1]

    def add(partial: Partial, k: Layer, v: Layer, allowed: jax.Array) -> Partial:
        row_max, total, out = partial
        scores = _scores(q, k, allowed)
        new_max = jnp.maximum(row_max, scores.max(-1))
        weights, correction = jnp.exp(scores - new_max[..., None]), jnp.exp(row_max - new_max)
        # Where all scores of a query are MASKED, its weights would be one.
        weights = jnp.where(scores > MASKED, weights, 0.0)
        out = out * correction[..., None] + _weighted_values(weights, v, q.dtype)
        return new_max, total * correction + weights.sum(-1), out

    def add_block(index: jax.Array, partial: Partial) -> Partial:
        # The last block may overlap the one before it, whose slots are masked.
        start = jnp.minimum(index * block_size, slots - block_size)
        slice_block = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, block_size, axis)  # noqa: E731
        block_mask = mask._replace(k_positions=slice_block(mask.k_positions, 1))
        if mask.allowed is not None:
            block_mask = block_mask._replace(allowed=slice_block(mask.allowed, 2))
        is_new = start + jnp.arange(block_size) >= index * block_size
        keys, values = jax.tree.map(lambda x: slice_slots(x, len(q), start, block_size), (k, v))
        return add(partial, keys, values, block_mask.as_array(window) & is_new)

    if used is None or slots <= block_size:
        return add(partial, k, v, mask.as_array(window))
    partial = spmd.pvary_like(partial, (q, k, v, mask))
    return jax.lax.fori_loop(0, -(-used // block_size), add_block, partial)


def _gather_context(x: jax.Array) -> jax.Array:
    """[B, S], gathered over the mesh axis `context`."""
    return sharding.constrain(x, P(sharding.BATCH, None))
