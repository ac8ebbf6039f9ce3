"""Policy optimization: clipped ratios of token or sequence probabilities; GRPO and its variants, PPO.

An example is a prompt with a completion, a segment of a row; the mask selects the completion. Its tokens
carry their advantage, and the log-probability that they had when they were sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from llama_jax import LlamaConfig
from llama_jax.forward_options import ForwardOptions
from llama_jax.loss import Loss, map_logits, shift_left, shift_right
from llama_jax.model import hidden_states

from ..config.rl import RatioLevel, RLConfig
from ..config.train import TrainConfig
from .common import Batch, Metrics, MetricsFn, forward_options, segment_cumsum, segment_ends, unshard_sequence

# Sums over the tokens of completions, whose number is `tokens`.
POLICY_METRICS = {
    "grpo": ("tokens", "clip_fraction", "kl", "entropy", "forward_diff"),
    "ppo": ("tokens", "clip_fraction", "entropy", "forward_diff", "value_loss", "value_clip_fraction"),
}


@chex.dataclass(frozen=True, mappable_dataclass=False)
class PolicyLoss(Loss):
    """A `Loss` with sums beside it.

    Attributes:
      metrics: f32 [] each, by the objective's names in `POLICY_METRICS`.
    """

    metrics: dict[str, jax.Array] | None = None


def segment_totals(values: jax.Array, ids: jax.Array) -> jax.Array:
    """f32 [B, T]: at every token the sum of `values` over its segment.

    Args:
      values: f32 [B, T].
      ids: int [B, T].
    """
    up_to, from_there = segment_cumsum(values, ids), segment_cumsum(values[:, ::-1], ids[:, ::-1])[:, ::-1]
    return up_to + from_there - values


def k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """p_ref / p - log(p_ref / p) - 1 of sampled tokens: KL(p || p_ref), unbiased and never negative.

    The estimator k3 of John Schulman's "Approximating KL divergence" (2020), as in GRPO (arXiv 2402.03300).
    """
    difference = reference - logprobs
    return jnp.expm1(difference) - difference


def clipped_surrogate(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    level: RatioLevel = "token",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) of every token (PPO, arXiv 1707.06347).

    r is p / p_old of the token, or with `level="sequence"` the geometric mean of that over the completion
    (GSPO, arXiv 2507.18071); other bounds above and below are DAPO's (arXiv 2503.14476).

    Args:
      logprobs, old_logprobs: f32 [B, T], of each token, by the present policy and by the one that sampled.
      advantages: f32 [B, T].
      mask: [B, T], 1 for the tokens of completions.
      segment_ids: int [B, T].
      epsilon, epsilon_high: the latter is the former by default.
      level: of the ratios.

    Returns:
      The losses and the ratios r, f32 [B, T]; and where a ratio was clipped, bool [B, T].
    """
    mask = mask > 0
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    if level == "sequence":
        count = segment_totals(mask.astype(jnp.float32), segment_ids)
        log_ratio = segment_totals(log_ratio, segment_ids) / jnp.maximum(count, 1.0)
    ratio, high = jnp.exp(log_ratio), epsilon if epsilon_high is None else epsilon_high
    losses = -jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - epsilon, 1 + high) * advantages)
    clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    return losses, ratio, clipped & mask


def aggregate(
    losses: jax.Array, mask: jax.Array, segment_ids: jax.Array, *, loss_type: str, max_length: int
) -> Loss:
    """Averages the losses of tokens.

    Args:
      losses: f32 [B, T].
      mask: [B, T].
      segment_ids: int [B, T].
      loss_type: `grpo`: the mean over each completion, then over completions; `dapo`: over all tokens, so
        that long completions weigh more (arXiv 2503.14476); `dr_grpo`: the sum over each completion divided
        by `max_length`, so that no token's weight depends on the completion's length (arXiv 2503.20783).
      max_length: see there.

    Returns:
      A `Loss` whose mean it is, and which can be added to that of other completions.
    """
    mask = mask > 0
    losses = jnp.where(mask, losses, 0.0)
    if loss_type == "dapo":
        return Loss(total=losses.sum(), count=mask.sum().astype(jnp.float32))
    lengths = segment_totals(mask.astype(jnp.float32), segment_ids)
    count = (segment_ends(segment_ids) & (lengths > 0)).sum().astype(jnp.float32)
    weights = 1 / jnp.maximum(lengths, 1.0) if loss_type == "grpo" else 1 / max_length
    return Loss(total=(losses * weights).sum(), count=count)


def policy_logprobs(
    model: LlamaConfig, options: ForwardOptions, *, temperature: float, num_chunks: int
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """Makes (params, batch) -> log p of each token at a temperature, and the entropy of its distribution.

    f32 [B, T] each, at the token that is predicted; of a segment's first token they mean nothing. Entropies
    have no gradient. The third result are the last hidden states [B, T, D].
    """

    def of_logits(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits / temperature if temperature != 1 else logits
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        log_z = jax.nn.logsumexp(logits, axis=-1)
        constant, normalizer = jax.lax.stop_gradient((logits, log_z))
        mean_logit = (jnp.exp(constant - normalizer[..., None]) * constant).sum(-1)
        return jnp.where(is_target, logits, 0.0).sum(-1) - log_z, normalizer - mean_logit

    def logprobs(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        x = hidden_states(model, params, *inputs, options=options)
        found = map_logits(params, x, of_logits, shift_left(batch["tokens"]), num_chunks=num_chunks)
        return shift_right(found[0]), shift_right(found[1]), x

    return logprobs


def surrogate_of(rl: RLConfig, batch: Batch, logprobs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`clipped_surrogate` of a batch with `advantages` and `old_logprobs`, f32 [B, T]."""
    return clipped_surrogate(
        logprobs,
        unshard_sequence(batch["old_logprobs"]),
        unshard_sequence(batch["advantages"]),
        unshard_sequence(batch["mask"]),
        unshard_sequence(batch["segment_ids"]),
        epsilon=rl.epsilon,
        epsilon_high=rl.epsilon_high,
        level=rl.importance_sampling_level,
    )


def policy_loss(rl: RLConfig, batch: Batch, losses: jax.Array, metrics: dict[str, jax.Array]) -> PolicyLoss:
    """`aggregate` of the losses of tokens, with the sums of metrics f32 [B, T] over completions."""
    ids, mask = unshard_sequence(batch["segment_ids"]), unshard_sequence(batch["mask"])
    loss = aggregate(losses, mask, ids, loss_type=rl.loss_type, max_length=rl.max_completion_length)
    sums = {name: jnp.where(mask > 0, x, 0.0).sum() for name, x in metrics.items()}
    return PolicyLoss(total=loss.total, count=loss.count, metrics=jax.lax.stop_gradient(sums))


def policy_optimization(model: LlamaConfig, config: TrainConfig, platform: str, rl: RLConfig) -> MetricsFn:
    """`clipped_surrogate` plus beta `k3` to the reference model, averaged by `aggregate`: GRPO.

    Batches have `advantages` and `old_logprobs`, f32 [B, T]. With `train.exact_rollouts` they also have
    `logprobs`, those of the present policy by the program that sampled: the loss has the value of these, and
    the gradient of the forward pass here. Where a ratio is 1 that gradient is the one of `-A log p`.

    Args:
      model: the model's configuration.
      config: the `train` section.
      platform: the platform that it is compiled for, such as `tpu`.
      rl: the `rl` section.
    """
    options = forward_options(config, platform)
    chunks, is_exact = config.loss_chunks, config.exact_rollouts
    logprobs_fn = policy_logprobs(model, options, temperature=rl.temperature, num_chunks=chunks)

    def metrics_fn(params: Any, batch: Batch, *, reference: Any = None) -> tuple[PolicyLoss, Metrics]:
        forward, entropy, _ = logprobs_fn(params, batch)
        logprobs = with_value(forward, unshard_sequence(batch["logprobs"])) if is_exact else forward
        losses, ratio, clipped = surrogate_of(rl, batch, logprobs)
        kl = jnp.zeros_like(losses)
        if rl.beta:
            reference_logprobs, *_ = jax.lax.stop_gradient(logprobs_fn(reference, batch))
            kl = jnp.where(unshard_sequence(batch["mask"]) > 0, k3(logprobs, reference_logprobs), 0.0)
            losses = losses + rl.beta * kl * (ratio if rl.use_bias_correction_kl else 1.0)
        metrics = {
            "tokens": jnp.ones_like(losses),
            "clip_fraction": clipped.astype(jnp.float32),
            "kl": kl,
            "entropy": entropy,
            "forward_diff": jnp.abs(logprobs - forward),
        }
        return policy_loss(rl, batch, losses, metrics), {}

    return metrics_fn


@jax.custom_jvp
def with_value(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, with the gradient of x: `x + stop_gradient(value - x)` without its rounding error."""
    del x
    return value


@with_value.defjvp
def _with_value_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]
