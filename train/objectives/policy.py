"""Policy optimization: clipped ratios of token or sequence probabilities; GRPO and its variants, PPO.

An example is a prompt with a completion, a segment of a row; the mask selects the completion. Its tokens
carry their advantage, and the log-probability that they had when they were sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import LlamaConfig, sharding
from llama_jax.forward_options import ForwardOptions
from llama_jax.loss import Loss, map_logits, shift_left, shift_right
from llama_jax.model import hidden_states
from llama_jax.ops.gradient_sums import Maximum

from ..config.rl import RatioLevel, RLConfig
from ..config.run import RunConfig
from ..config.train import TrainConfig
from .common import Batch, Metrics, MetricsFn, forward_options, segment_cumsum, segment_ends, unshard_sequence

_OF_ALL = ("tokens", "clip_fraction", "entropy")
_OF_OBJECTIVE: Mapping[str, tuple[str, ...]] = {
    "grpo": (*_OF_ALL, "kl"),
    "ppo": (*_OF_ALL, "value_loss", "value_clip_fraction"),
}
# of a log-probability that stands for another: by the program that sampled, beside the update's
_OF_LOGPROBS: Mapping[str, tuple[str, ...]] = {
    "old_logprobs": (),
    "logprobs": ("forward_diff",),
    "rollout_logprobs": ("rollout_logprob_diff_mean", "rollout_logprob_diff_max", "rollout_kl"),
}


def metric_names(run: RunConfig) -> tuple[str, ...]:
    """The metrics of a run's `PolicyLoss`; none for other losses.

    Sums over the tokens of completions, whose number is `tokens`; what ends in `_max` is a `Maximum`.
    """
    if run.train.objective not in _OF_OBJECTIVE:
        return ()
    names = _OF_OBJECTIVE[run.train.objective]
    return names + tuple(name for array in run.logprob_arrays for name in _OF_LOGPROBS[array])


def empty_metrics(names: Sequence[str]) -> dict[str, jax.Array | Maximum]:
    """The metrics of no tokens; none is below 0."""
    zero = jnp.zeros((), jnp.float32)
    return {name: Maximum(value=zero) if name.endswith("_max") else zero for name in names}


@chex.dataclass(frozen=True, mappable_dataclass=False)
class PolicyLoss(Loss):
    """A `Loss` with sums beside it.

    Attributes:
      metrics: f32 [] each, by `metric_names`.
    """

    metrics: dict[str, jax.Array | Maximum] | None = None


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


@chex.dataclass(frozen=True, mappable_dataclass=False)
class TokenLogprobs:
    """What a forward pass says of the tokens of completions; elsewhere it means nothing.

    Attributes:
      logprobs: f32 [B, T], log p of each token at the temperature of sampling.
      plain: f32 [B, T], the same at temperature 1, as decoding reports it; without a gradient.
      entropy: f32 [B, T], of the distribution that the token is sampled from; without a gradient.
      hidden: [B, T, D], the last hidden states.
    """

    logprobs: jax.Array
    plain: jax.Array
    entropy: jax.Array
    hidden: jax.Array


def policy_logprobs(
    model: LlamaConfig,
    options: ForwardOptions,
    *,
    temperature: float,
    num_chunks: int,
    longest: int | None = None,
) -> Callable[[Any, Batch], TokenLogprobs]:
    """Makes (params, batch) -> `TokenLogprobs`.

    With `longest` logits are computed for that many positions of a row alone, from the first one on that the
    mask selects, unless the mesh has `context`. If the mask selects one after these, its values are NaN.
    """

    def of_logits(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        logit, log_z = jnp.where(is_target, logits, 0.0).sum(-1), jax.nn.logsumexp(logits, axis=-1)
        plain = jax.lax.stop_gradient(logit - log_z)
        if temperature != 1:
            logits, logit = logits / temperature, logit / temperature
            log_z = jax.nn.logsumexp(logits, axis=-1)
        constant, normalizer = jax.lax.stop_gradient((logits, log_z))
        mean_logit = (jnp.exp(constant - normalizer[..., None]) * constant).sum(-1)
        return logit - log_z, plain, normalizer - mean_logit

    def logprobs(params: Any, batch: Batch) -> TokenLogprobs:
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        hidden = hidden_states(model, params, *inputs, options=options)
        targets = shift_left(batch["tokens"])
        if longest and longest < hidden.shape[1] and sharding.explicit_axes().get("context", 1) == 1:
            # The position before the first token, which predicts it.
            first = jnp.argmax(unshard_sequence(batch["mask"]) > 0, axis=1) - 1
            start = jnp.clip(first, 0, hidden.shape[1] - longest)
            rows = sharding.constrain(hidden, P(sharding.BATCH, None, None)), targets
            parts = tuple(_window(x, start, longest) for x in rows)
            found = map_logits(params, parts[0], of_logits, parts[1], num_chunks=num_chunks)
            found = jax.tree.map(lambda values: _unwindow(values, start, batch["mask"]), found)
        else:
            found = map_logits(params, hidden, of_logits, targets, num_chunks=num_chunks)
        values = dict(zip(("logprobs", "plain", "entropy"), map(shift_right, found), strict=True))
        return TokenLogprobs(**values, hidden=hidden)

    return logprobs


def _window(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Positions start[b]..start[b]+size-1 of each row of x [B, T, ...]."""
    return jax.vmap(lambda row, first: jax.lax.dynamic_slice_in_dim(row, first, size))(x, start)


def _unwindow(values: jax.Array, start: jax.Array, mask: jax.Array) -> jax.Array:
    """`_window` [B, size] -> [B, T], 0 elsewhere; NaN if a token that `mask` [B, T] selects was left out."""
    size, predicts = values.shape[1], shift_left(mask) > 0
    zeros = jnp.zeros_like(predicts, values.dtype)
    out = jax.vmap(lambda row, part, first: jax.lax.dynamic_update_slice_in_dim(row, part, first, 0))(
        zeros, unshard_sequence(values), start
    )
    place = jnp.arange(mask.shape[1])
    is_outside = (place < start[:, None]) | (place >= start[:, None] + size)
    return jnp.where(is_outside & predicts, jnp.nan, out)


def surrogate_of(rl: RLConfig, batch: Batch, logprobs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`clipped_surrogate` of a batch with `advantages`, f32 [B, T].

    Without `old_logprobs` it was sampled by the present weights: ratios are 1, with the gradient of log p.
    """
    old = batch.get("old_logprobs")
    return clipped_surrogate(
        logprobs,
        jax.lax.stop_gradient(logprobs) if old is None else unshard_sequence(old),
        unshard_sequence(batch["advantages"]),
        unshard_sequence(batch["mask"]),
        unshard_sequence(batch["segment_ids"]),
        epsilon=rl.epsilon,
        epsilon_high=rl.epsilon_high,
        level=rl.importance_sampling_level,
    )


def policy_loss(rl: RLConfig, batch: Batch, losses: jax.Array, metrics: dict[str, jax.Array]) -> PolicyLoss:
    """`aggregate` of the losses of tokens, with the sums and maxima of metrics f32 [B, T], which are >= 0."""
    ids, mask = unshard_sequence(batch["segment_ids"]), unshard_sequence(batch["mask"])
    loss = aggregate(losses, mask, ids, loss_type=rl.loss_type, max_length=rl.max_completion_length)

    def reduced(name: str, values: jax.Array) -> jax.Array | Maximum:
        values = jnp.where(mask > 0, values, 0.0)
        return Maximum(value=values.max()) if name.endswith("_max") else values.sum()

    found = {name: reduced(name, jax.lax.stop_gradient(values)) for name, values in metrics.items()}
    return PolicyLoss(total=loss.total, count=loss.count, metrics=found)


def policy_optimization(
    model: LlamaConfig, config: TrainConfig, platform: str, rl: RLConfig, *, packed: bool = True
) -> MetricsFn:
    """`clipped_surrogate` plus beta `k3` to the reference model, averaged by `aggregate`: GRPO.

    Batches have `advantages` and those of `RunConfig.logprob_arrays`, f32 [B, T]. With `old_logprobs` alone
    ratios are to these. With `logprobs` beside them, those of the present policy by the program that sampled,
    the loss has the value of these, and the gradient of the forward pass here. With `rollout_logprobs` the
    present weights are those that sampled: every ratio is 1, and how far decoding and this forward pass are
    apart is measured. Where a ratio is 1, the gradient is the one of `-A log p`.

    Args:
      model: the model's configuration.
      config: the `train` section.
      platform: the platform that it is compiled for, such as `tpu`.
      rl: the `rl` section.
      packed: whether a row may have more than one completion.
    """
    logprobs_fn = policy_logprobs(
        model,
        forward_options(config, platform),
        temperature=rl.temperature,
        num_chunks=config.loss_chunks,
        longest=None if packed else rl.max_completion_length,
    )

    def metrics_fn(params: Any, batch: Batch, *, reference: Any = None) -> tuple[PolicyLoss, Metrics]:
        forward = logprobs_fn(params, batch)
        logprobs, of_logprobs = present_logprobs(forward, batch)
        losses, ratio, clipped = surrogate_of(rl, batch, logprobs)
        kl = jnp.zeros_like(losses)
        if rl.beta:
            reference_logprobs = jax.lax.stop_gradient(logprobs_fn(reference, batch).logprobs)
            kl = jnp.where(unshard_sequence(batch["mask"]) > 0, k3(logprobs, reference_logprobs), 0.0)
            losses = losses + rl.beta * kl * (ratio if rl.use_bias_correction_kl else 1.0)
        metrics = {
            "tokens": jnp.ones_like(losses),
            "clip_fraction": clipped.astype(jnp.float32),
            "kl": kl,
            "entropy": forward.entropy,
            **of_logprobs,
        }
        return policy_loss(rl, batch, losses, metrics), {}

    return metrics_fn


def present_logprobs(forward: TokenLogprobs, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """log p of the present policy f32 [B, T], and metrics of what the batch has to compare it with."""
    if "logprobs" in batch:
        logprobs = with_value(forward.logprobs, unshard_sequence(batch["logprobs"]))
        return logprobs, {"forward_diff": jnp.abs(logprobs - forward.logprobs)}
    if "rollout_logprobs" not in batch:
        return forward.logprobs, {}
    difference = forward.plain - unshard_sequence(batch["rollout_logprobs"])
    distance = jnp.abs(difference)
    return forward.logprobs, {
        "rollout_logprob_diff_mean": distance,
        "rollout_logprob_diff_max": distance,
        "rollout_kl": jnp.expm1(difference) - difference,  # k3 of KL(rollout || trainer)
    }


@jax.custom_jvp
def with_value(x: jax.Array, value: jax.Array) -> jax.Array:
    """`value`, with the gradient of x: `x + stop_gradient(value - x)` without its rounding error."""
    del x
    return value


@with_value.defjvp
def _with_value_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]
