"""Losses over pairs of answers: DPO and its kin, and the reward model's, from numbers of each answer.

Everything here is plain arithmetic on arrays of one number a pair; `objectives.py` makes those numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ..config.objective import LossType


def dpo_loss(
    policy_chosen: jax.Array,
    policy_rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    lengths: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Direct preference optimisation (arXiv 2305.18290), conservative DPO, and IPO (arXiv 2310.12036).

    With r = log p / p_ref of an answer, and m = r_chosen - r_rejected:

        sigmoid: -(1 - e) log s(beta m) - e log s(-beta m), e the label smoothing (cDPO where it is not 0)
        ipo:     (m - 1 / (2 beta))^2, log-probabilities taken as means over an answer's tokens

    Args:
      policy_chosen, policy_rejected: f32 [P], the answers' summed log-probabilities.
      reference_chosen, reference_rejected: f32 [P], those of the model that training began with.
      beta: how strongly the policy is held to the reference.
      loss_type: which loss.
      label_smoothing: the share of pairs that are thought to be labelled the wrong way round, below 0.5.
      lengths: f32 [P] each, the answers' numbers of tokens; `ipo` divides by them.

    Returns:
      The losses; the implicit rewards beta r of the chosen and of the rejected answers, without gradients;
      f32 [P] each.
    """
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    rewards = (jax.lax.stop_gradient(beta * chosen), jax.lax.stop_gradient(beta * rejected))
    if loss_type == "ipo":
        if lengths is not None:
            chosen, rejected = chosen / jnp.maximum(lengths[0], 1.0), rejected / jnp.maximum(lengths[1], 1.0)
        return (chosen - rejected - 1 / (2 * beta)) ** 2, *rewards
    margin = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(
        -margin
    )
    return losses, *rewards


def ranking_loss(chosen: jax.Array, rejected: jax.Array, margin: jax.Array | float = 0.0) -> jax.Array:
    """-log s(r_chosen - r_rejected - margin): Bradley-Terry with Llama 2's margin (arXiv 2307.09288, eq. 2).

    Args:
      chosen, rejected: f32 [P], the rewards of both answers.
      margin: f32 [P], how much better the chosen answer was judged to be; the paper's tables 27 and 28.

    Returns:
      f32 [P].
    """
    return -jax.nn.log_sigmoid(chosen - rejected - margin)
