"""Masked next-token cross-entropy, in chunks, so that the logits of a whole sequence never exist at once."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import sharding
from llama_jax.attention import Backend
from llama_jax.config import LlamaConfig
from llama_jax.layers import output_matrix, unembed
from llama_jax.model import ForwardOptions, Params, Remat, hidden_states
from llama_jax.ops.fused_cross_entropy import fused_cross_entropy
from llama_jax.ops.quantization import Quantized


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Loss:
    """A sum and what it is the sum of, so that losses of several batches add up.

    Attributes:
      total: f32 [], the negative log-likelihood in nats, summed over counted tokens.
      count: f32 [], the number (or weight) of counted tokens.
    """

    total: jax.Array
    count: jax.Array

    @property
    def mean(self) -> jax.Array:
        """Nats a token; 0 where no token counts."""
        return self.total / jnp.maximum(self.count, 1e-9)


@functools.partial(
    jax.jit,
    static_argnames=("config", "options", "dtype", "attention_backend", "remat", "custom_vjp", "num_chunks"),
)
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
    embedding_noise: jax.Array | None = None,
) -> Loss:
    """-log p(tokens[t+1] | tokens[..t]), summed over the predictions that count.

    Args:
      config: the model.
      params: its parameters.
      tokens: int [B, T].
      mask: bool or f32 [B, T]; entry t weighs the prediction OF token t, so entry 0 has no effect. None
        counts all. A prediction across a segment boundary never counts.
      positions: as for `forward`.
      segment_ids: as for `forward`.
      options, dtype, attention_backend, remat, custom_vjp: as for `forward`; `custom_vjp` also forms the loss's
        gradient in the forward pass, so that no logits are computed twice.
      num_chunks: in how many pieces the logits are formed.
      z_loss: weight of log^2 of the softmax's normaliser, which keeps logits from drifting (PaLM, arXiv
        2204.02311, section 5). It is in `total`.
      embedding_noise: [B, T, D], added to the embeddings (NEFTune, arXiv 2310.05914).

    Returns:
      A `Loss`; divide `total` by `count` for the mean.
    """
    weights = jnp.ones(tokens.shape, jnp.float32) if mask is None else mask.astype(jnp.float32)
    # Each target is the token one place on, which may be another device's: the row is gathered to shift it.
    targets, weights = (_next(x) for x in (tokens, weights))
    last = jnp.arange(tokens.shape[1]) == tokens.shape[1] - 1
    weights = jnp.where(last, 0.0, weights)
    if segment_ids is not None:
        weights = jnp.where(_whole(segment_ids) == _next(segment_ids), weights, 0.0)
    options = options.override(
        dtype=dtype, attention_backend=attention_backend, remat=remat, custom_vjp=custom_vjp
    )
    x = hidden_states(
        config,
        params,
        tokens,
        positions,
        segment_ids,
        options=options,
        embedding_noise=embedding_noise,
    )
    z_loss = jnp.asarray(z_loss, jnp.float32)
    if options.custom_vjp and not isinstance(output_matrix(params), Quantized):
        total = fused_cross_entropy(x, params, targets, weights, z_loss, num_chunks=num_chunks)
        return Loss(total=total, count=weights.sum())
    return cross_entropy(x, params, targets, weights, z_loss, num_chunks=num_chunks)


@functools.partial(jax.jit, static_argnames=("config", "options", "num_chunks"))
def token_logprobs(
    config: LlamaConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    options: ForwardOptions = ForwardOptions(),
    num_chunks: int = 8,
) -> jax.Array:
    """log p(tokens[t] | tokens[..t-1]) of every token, without ever holding the logits of all of them.

    Args:
      config, params, tokens, positions, segment_ids, options: as for `forward`.
      num_chunks: in how many pieces the logits are formed.

    Returns:
      f32 [B, T]; 0 at the first token of a row and of each segment, which nothing predicts.
    """
    x = hidden_states(
        config,
        params,
        tokens,
        positions,
        segment_ids,
        options=options,
    )

    def one(chunk: Any) -> jax.Array:
        x, targets = chunk
        picked, log_total = _picked(unembed(x, params), targets)
        return picked - log_total

    length, chunks = x.shape[1], _chunk_count(x.shape[1], num_chunks)
    found = jax.lax.map(jax.checkpoint(one), tuple(_cut(array, chunks) for array in (x, _next(tokens))))
    logprobs = jnp.moveaxis(found, 0, 2).reshape(x.shape[0], -1)[:, :length]
    predicted = jnp.arange(length) > 0
    if segment_ids is not None:
        segments = _whole(segment_ids)
        predicted = predicted & (segments == jnp.roll(segments, 1, axis=1))
    return jnp.where(predicted, jnp.roll(_whole(logprobs), 1, axis=1), 0.0)


def _whole(x: jax.Array) -> jax.Array:
    return sharding.constrain(jnp.asarray(x), P(sharding.BATCH, None))


def _next(x: jax.Array) -> jax.Array:
    return jnp.roll(_whole(x), -1, axis=1)


def cross_entropy(
    x: jax.Array,
    params: Params,
    targets: jax.Array,
    weights: jax.Array,
    z_loss: jax.Array,
    *,
    num_chunks: int,
) -> Loss:
    """Weighted cross-entropy of `unembed(x)`, forming [B, T / num_chunks, V] logits at a time.

    Args:
      x: hidden states [B, T, D].
      params: the tree that holds the output projection.
      targets: int [B, T].
      weights: f32 [B, T].
      z_loss: f32 [], as for `next_token_loss`.
      num_chunks: as for `next_token_loss`.
    """
    chunks = _chunk_count(x.shape[1], num_chunks)

    @jax.checkpoint  # a chunk's logits are formed again in the backward pass
    def one(chunk: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        x, targets, weights = chunk
        picked, log_total = _picked(unembed(x, params), targets)
        return (weights * (log_total - picked + z_loss * log_total**2)).sum()

    totals = jax.lax.map(one, tuple(_cut(array, chunks) for array in (x, targets, weights)))
    return Loss(total=totals.sum(), count=weights.sum())


def _picked(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The targets' logits, and the logarithm of the softmax's normaliser, f32 [B, T] each."""
    # Compared with an iota rather than gathered, so that the vocabulary may be split over devices.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.where(is_target, logits, 0.0).sum(-1), jax.nn.logsumexp(logits, axis=-1)


def _chunk_count(length: int, wanted: int) -> int:
    return max(1, min(wanted, length // sharding.explicit_axes().get("context", 1)))


def _cut(array: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] -> [chunks, B, T / chunks, ...], padded with zeros.

    Chunk c holds positions c, c + chunks, c + 2 chunks, ...: a strided cut leaves every shard of the
    sequence with an equal part of each chunk.
    """
    if pad := -array.shape[1] % (chunks * sharding.explicit_axes().get("context", 1)):
        array = sharding.constrain(array, P(sharding.BATCH, *(None,) * (array.ndim - 1)))
        array = jnp.pad(array, [(0, pad) if axis == 1 else (0, 0) for axis in range(array.ndim)])
    return jnp.moveaxis(array.reshape(array.shape[0], -1, chunks, *array.shape[2:]), 2, 0)
