"""Proximal policy optimization: the clipped surrogate, beside the clipped loss of a value function.

As in PPO (arXiv 1707.06347) and Llama 2 (arXiv 2307.09288, section 3.2.3): the KL penalty to the reference
model is in the rewards of tokens, from which advantages and returns were made when completions were sampled.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama_jax import LlamaConfig, sharding
from llama_jax.forward_options import ForwardOptions
from llama_jax.loss import shift_right
from llama_jax.model import hidden_states

from ..config.rl import RLConfig
from ..config.train import TrainConfig
from ..network import Network
from .common import Batch, Metrics, MetricsFn, forward_options, unshard_sequence
from .policy import PolicyLoss, policy_logprobs, policy_loss, present_logprobs, surrogate_of


def clipped_value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, *, cliprange: float
) -> tuple[jax.Array, jax.Array]:
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2 of every token.

    The clipping of OpenAI's baselines, as in TRL: the value function is not moved further from what it was at
    sampling, as the policy is not.

    Args:
      values, old_values: f32 [B, T], of the state before each token, now and at sampling.
      returns: f32 [B, T], the targets R.
      cliprange: c.

    Returns:
      The losses f32 [B, T], and where the clipped one counts, bool [B, T].
    """
    clipped = jnp.clip(values, old_values - cliprange, old_values + cliprange)
    plain, held = (values - returns) ** 2, (clipped - returns) ** 2
    return jnp.maximum(plain, held) / 2, held > plain


def token_values(value: Any, batch: Batch, hidden: jax.Array | None, options: ForwardOptions) -> jax.Array:
    """V f32 [B, T], the value of the state before each token; of a segment's first token it means nothing.

    Args:
      value: a head {"kernel": [D, 1]}, or a `Network` with one.
      batch: tokens, positions, segment_ids.
      hidden: [B, T, D], the policy's last hidden states, which a head reads; a network needs none.
      options: of a network's forward pass.
    """
    x, head = hidden, value
    if isinstance(value, Network):
        inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
        x = hidden_states(value.config, value.params, *inputs, options=options)
        head = value.params["score"]
    assert x is not None
    x = sharding.constrain(x, P(sharding.BATCH, None, None)).astype(jnp.float32)
    # Entry t is of the state after token t, which is the one before token t + 1.
    return shift_right(jnp.einsum("btd,dc->btc", x, head["kernel"], precision="highest")[..., 0])


def proximal_policy(
    model: LlamaConfig, config: TrainConfig, platform: str, rl: RLConfig, *, packed: bool = True
) -> MetricsFn:
    """`clipped_surrogate` plus vf_coef `clipped_value_loss`, averaged by `aggregate`.

    Batches have `advantages`, `old_logprobs`, `old_values` and `returns`, f32 [B, T], and with
    `train.exact_rollouts` also `logprobs`, as in `policy_optimization`; parameters have the value function as
    `value`.

    Args:
      model: the policy's configuration.
      config: the `train` section.
      platform: the platform that it is compiled for, such as `tpu`.
      rl: the `rl` section.
      packed: whether a row may have more than one completion.
    """
    options = forward_options(config, platform)
    logprobs_fn = policy_logprobs(
        model,
        options,
        temperature=rl.temperature,
        num_chunks=config.loss_chunks,
        longest=None if packed else rl.max_completion_length,
    )

    def metrics_fn(params: Any, batch: Batch, *, reference: Any = None) -> tuple[PolicyLoss, Metrics]:
        del reference  # its penalty is in the rewards
        forward = logprobs_fn(params, batch)
        logprobs, of_logprobs = present_logprobs(forward, batch)
        losses, _, clipped = surrogate_of(rl, batch, logprobs)
        old_values, returns = (unshard_sequence(batch[name]) for name in ("old_values", "returns"))
        values = unshard_sequence(token_values(params["value"], batch, forward.hidden, options))
        value_losses, held = clipped_value_loss(values, old_values, returns, cliprange=rl.cliprange_value)
        metrics = {
            "tokens": jnp.ones_like(losses),
            "clip_fraction": clipped.astype(jnp.float32),
            "entropy": forward.entropy,
            "value_loss": value_losses,
            "value_clip_fraction": held.astype(jnp.float32),
            **of_logprobs,
        }
        return policy_loss(rl, batch, losses + rl.vf_coef * value_losses, metrics), {}

    return metrics_fn
