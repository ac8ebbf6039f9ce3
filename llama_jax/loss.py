"""Masked next-token cross-entropy in chunks: the logits of a whole sequence are never in memory at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.attention import Backend
from llama_jax.config import LlamaConfig
from llama_jax.errors import InputError
from llama_jax.forward_options import ForwardOptions
from llama_jax.layers import output_matrix, unembed
from llama_jax.model import Params, routed_hidden_states
from llama_jax.ops.fused_cross_entropy import fused_cross_entropy
from llama_jax.ops.inputs import as_array
from llama_jax.ops.quantization import Quantized
from llama_jax.ops.remat import Remat
from llama_jax.ops.router_losses import RouterLosses
from llama_jax.taps import EDIT, Edit, edited, with_edit


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Loss:
    """A sum and its weight, so that the losses of several batches can be added.

    Attributes:
      total: f32 [], the negative log-likelihood in nats, summed over the tokens with their weights.
      count: f32 [], the sum of the weights.
      router: the auxiliary losses of a mixture's routers, times `count`; None without experts.
    """

    total: jax.Array
    count: jax.Array
    router: RouterLosses | None = None

    @property
    def mean(self) -> jax.Array:
        """Nats per token; 0 if all weights are 0."""
        return self.total / jnp.maximum(self.count, 1e-9)


def next_token_loss(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    options: ForwardOptions = ForwardOptions(),
    dtype: jax.typing.DTypeLike | None = None,
    attention_backend: Backend | None = None,
    remat: Remat | None = None,
    custom_vjp: bool | None = None,
    num_chunks: int = 8,
    z_loss: float | jax.Array = 0.0,
    router_aux_loss: float | jax.Array = 0.0,
    router_z_loss: float | jax.Array = 0.0,
    embedding_noise: jax.Array | None = None,
    edit: Edit | None = None,
) -> Loss:
    """-log p(tokens[t+1] | tokens[..t]), summed over the predictions with their weights.

    Args:
      config: the model.
      params: its parameters.
      tokens: int [B, T].
      mask: bool or f32 [B, T]; entry t is the weight of the prediction OF token t, so entry 0 has no effect.
        None: all ones. A prediction across a segment boundary has weight 0.
      positions: as for `forward`.
      segment_ids: as for `forward`.
      options, dtype, attention_backend, remat, custom_vjp: as for `forward`. `custom_vjp` also computes the
        gradient of the loss in the forward pass, so that logits are computed once.
      num_chunks: number of chunks of T; logits are f32 [B, T / num_chunks, V] at a time.
      z_loss: weight of log^2 of the softmax normalizer, which keeps logits from drifting (PaLM, arXiv
        2204.02311, section 5). It is included in `total`.
      router_aux_loss, router_z_loss: of a mixture of experts, the weights of `RouterLosses.balance` and `z`,
        over the tokens outside segment 0, included in `total` times `count`. Without experts they are not
        used.
      embedding_noise: [B, T, D], added to the embeddings (NEFTune, arXiv 2310.05914).
      edit: as for `forward`.

    Returns:
      A `Loss`; divide `total` by `count` for the mean.

    Raises:
      ConfigError, InputError: as `forward`.
    """
    options = options.override(
        dtype=dtype, attention_backend=attention_backend, remat=remat, custom_vjp=custom_vjp
    )
    tokens = as_array("tokens", tokens)
    if jnp.ndim(tokens) != 2:
        raise InputError(f"tokens has shape {jnp.shape(tokens)}; it must be [batch, length]")
    return _next_token_loss(
        config,
        with_edit(params, edit),
        tokens,
        as_array("mask", mask),
        as_array("positions", positions),
        as_array("segment_ids", segment_ids),
        jnp.asarray(z_loss, jnp.float32),
        embedding_noise,
        _router_weights(router_aux_loss, router_z_loss) if config.num_experts else None,
        options=options,
        num_chunks=num_chunks,
    )


@functools.partial(jax.jit, static_argnames=("config", "options", "num_chunks"))
def _next_token_loss(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    mask: jax.Array | None,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    z_loss: jax.Array,
    embedding_noise: jax.Array | None,
    router_weights: RouterLosses | None,
    *,
    options: ForwardOptions,
    num_chunks: int,
) -> Loss:
    weights = jnp.ones(tokens.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    targets = shift_left(tokens)
    weights = prediction_weights(weights, segment_ids)
    x, router = routed_hidden_states(
        config,
        params,
        tokens,
        positions,
        segment_ids,
        options=options,
        embedding_noise=embedding_noise,
    )
    if options.custom_vjp and EDIT not in params and not isinstance(output_matrix(params), Quantized):
        total = fused_cross_entropy(x, params, targets, weights, z_loss, num_chunks=num_chunks)
        loss = Loss(total=total, count=weights.sum())
    else:
        loss = cross_entropy(x, params, targets, weights, z_loss, num_chunks=num_chunks)
    return loss if router_weights is None else add_router_losses(loss, router, router_weights)


def prediction_weights(mask: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """The weight of the prediction that each position makes, that of the next token.

    Args:
      mask: f32 [B, T]; entry t is the weight of the prediction of token t.
      segment_ids: int [B, T]; a prediction across a segment boundary has weight 0.

    Returns:
      f32 [B, T]; entry t is the weight of the prediction at position t.
    """
    # The next token may be on another device of `context`, so rows are gathered before the shift.
    weights = shift_left(mask)
    last = jnp.arange(mask.shape[1]) == mask.shape[1] - 1
    weights = jnp.where(last, 0.0, weights)
    if segment_ids is None:
        return weights
    return jnp.where(_gather_context(segment_ids) == shift_left(segment_ids), weights, 0.0)


def _router_weights(balance: float | jax.Array, z: float | jax.Array) -> RouterLosses:
    return RouterLosses(balance=jnp.asarray(balance, jnp.float32), z=jnp.asarray(z, jnp.float32))


def add_router_losses(loss: Loss, router: RouterLosses | None, weights: RouterLosses) -> Loss:
    """A loss with the weighted losses of a mixture's routers in its mean; itself if there are none."""
    if router is None:
        return loss
    added = weights.balance * router.balance + weights.z * router.z
    router = RouterLosses(balance=router.balance * loss.count, z=router.z * loss.count)
    return Loss(total=loss.total + added * loss.count, count=loss.count, router=router)


def token_logprobs(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    options: ForwardOptions = ForwardOptions(),
    num_chunks: int = 8,
    edit: Edit | None = None,
) -> jax.Array:
    """log p(tokens[t] | tokens[..t-1]) of every token, with the logits of one chunk at a time in memory.

    Args:
      config, params, tokens, positions, segment_ids, options, edit: as for `forward`.
      num_chunks: as for `next_token_loss`.

    Returns:
      f32 [B, T]; 0 for the first token of each row and segment.
    """
    inputs = config, with_edit(params, edit), tokens, positions, segment_ids
    return routed_token_logprobs(*inputs, options=options, num_chunks=num_chunks)[0]


def routed_token_logprobs(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    options: ForwardOptions = ForwardOptions(),
    num_chunks: int = 8,
) -> tuple[jax.Array, RouterLosses | None]:
    """`token_logprobs`, and the routers' losses over tokens outside segment 0; None without experts."""
    tokens, positions = as_array("tokens", tokens), as_array("positions", positions)
    segment_ids = as_array("segment_ids", segment_ids)
    return _token_logprobs(
        config, params, tokens, positions, segment_ids, options=options, num_chunks=num_chunks
    )


@functools.partial(jax.jit, static_argnames=("config", "options", "num_chunks"))
def _token_logprobs(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    options: ForwardOptions,
    num_chunks: int,
) -> tuple[jax.Array, RouterLosses | None]:
    def target_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
        target_logits, log_z = _target_logits_and_log_z(logits, targets)
        return target_logits - log_z

    x, router = routed_hidden_states(config, params, tokens, positions, segment_ids, options=options)
    logprobs = map_logits(params, x, target_logprobs, shift_left(tokens), num_chunks=num_chunks)
    length = x.shape[1]
    predicted = jnp.arange(length) > 0
    if segment_ids is not None:
        segments = _gather_context(segment_ids)
        predicted = predicted & (segments == _roll(segments, 1))
    return jnp.where(predicted, _roll(_gather_context(logprobs), 1), 0.0), router


def map_logits(
    params: Params,
    x: jax.Array,
    function: Callable[..., Any],
    *inputs: Any,
    num_chunks: int,
) -> Any:
    """`function` of the logits of every position, of which one chunk at a time is in memory.

    Of several chunks the backward pass computes the logits again. Those of position t predict token t + 1.

    Args:
      params: the parameter tree; only the output projection is read.
      x: hidden states [B, T, D].
      function: (logits f32 [B, t, V], inputs [B, t, ...]) -> a tree of arrays [B, t], of some t of the
        positions.
      *inputs: trees of arrays [B, T, ...], of which the function gets those of its positions.
      num_chunks: as for `next_token_loss`.

    Returns:
      The tree of arrays [B, T].
    """
    x = sharding.gather_sequence(x)

    def of_chunk(chunk: Any) -> Any:
        x, inputs = chunk
        return function(edited(params, "logits", unembed(x, params)), *inputs)

    length, chunks = x.shape[1], _chunk_count(x.shape[1], num_chunks)
    if chunks == 1:
        return of_chunk((x, inputs))
    split = jax.tree.map(lambda array: _split(array, chunks), (x, inputs))
    mapped = jax.lax.map(jax.checkpoint(of_chunk), split)
    return jax.tree.map(lambda y: jnp.moveaxis(y, 0, 2).reshape(y.shape[1], -1)[:, :length], mapped)


def _gather_context(x: jax.Array) -> jax.Array:
    return sharding.constrain(jnp.asarray(x), P(sharding.BATCH, None))


def shift_left(x: jax.Array) -> jax.Array:
    """[B, T], rolled by one: position t, which predicts token t + 1, gets what belongs to that."""
    return _roll(_gather_context(x), -1)


def shift_right(x: jax.Array) -> jax.Array:
    """[B, T], rolled by one: token t + 1 gets what was computed at position t."""
    return _roll(_gather_context(x), 1)


def _roll(x: jax.Array, shift: int) -> jax.Array:
    """`jnp.roll` of [B, T] along T."""
    if x.shape[0] > 1:
        return jnp.roll(x, shift, axis=1)
    # JAX 0.12 drops the sharding of a sliced dimension of size one, and concatenates like shardings only.
    parts = (_gather_context(part) for part in (x[:, -shift:], x[:, :-shift]))
    return jnp.concatenate(list(parts), axis=1)


def cross_entropy(
    x: jax.Array,
    params: Params,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: jax.Array,
    *,
    num_chunks: int,
) -> Loss:
    """Weighted cross-entropy of `unembed(x)`, with logits [B, T / num_chunks, V] at a time.

    Args:
      x: hidden states [B, T, D].
      params: the parameter tree; only the output projection is read.
      targets: int [B, T].
      weights: f32 [B, T].
      z_loss: f32 [], as for `next_token_loss`.
      num_chunks: as for `next_token_loss`.
    """
    x, chunks = sharding.gather_sequence(x), _chunk_count(x.shape[1], num_chunks)

    @jax.checkpoint  # the backward pass recomputes the logits of a chunk
    def chunk_loss(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x, targets, weights = chunk
        target_logits, log_z = _target_logits_and_log_z(edited(params, "logits", unembed(x, params)), targets)
        return (weights * (log_z - target_logits + z_loss * log_z**2)).sum()

    totals = jax.lax.map(chunk_loss, tuple(_split(array, chunks) for array in (x, targets, weights)))
    return Loss(total=totals.sum(), count=weights.sum())


def _target_logits_and_log_z(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits of the targets and the log of the softmax normalizer, f32 [B, T] each."""
    # A comparison with an iota rather than a gather, so that the vocabulary may be sharded.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.where(is_target, logits, 0.0).sum(-1), jax.nn.logsumexp(logits, axis=-1)


def _chunk_count(length: int, num_chunks: int) -> int:
    return max(1, min(num_chunks, length // sharding.explicit_axes().get("context", 1)))


def _split(array: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...], padded with zeros.

    Chunk c has positions c, c + chunks, c + 2 chunks, ...: with this stride every shard of the sequence has
    an equal part of each chunk.
    """
    if pad := -array.shape[1] % (chunks * sharding.explicit_axes().get("context", 1)):
        array = sharding.constrain(array, P(sharding.BATCH, *(None,) * (array.ndim - 1)))
        array = jnp.pad(array, [(0, pad) if axis == 1 else (0, 0) for axis in range(array.ndim)])
    return jnp.moveaxis(array.reshape(array.shape[0], -1, chunks, *array.shape[2:]), 2, 0)
