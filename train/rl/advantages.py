"""From rewards to advantages: of groups of completions (GRPO), and of tokens with a value function (PPO).

All on the host, in f64 until the result: there are few numbers, and each process computes the same ones.
"""

from __future__ import annotations

import numpy as np

from ..config.rl import ScaleRewards

STD_EPSILON = 1e-4  # as in TRL: a group of nearly equal rewards is not blown up


def group_advantages(rewards: np.ndarray, scale: ScaleRewards = "group") -> np.ndarray:
    """A = r - mean(r), divided by a standard deviation: a group's advantages sum to zero.

    Args:
      rewards: [P, n], of the n completions of each of P prompts.
      scale: what A is divided by: `group`, the group's standard deviation (GRPO, arXiv 2402.03300); `batch`,
        that of all rewards; `none`, nothing (Dr. GRPO, arXiv 2503.20783). Deviations are those of a sample
        (n - 1), plus `STD_EPSILON`.

    Returns:
      f32 [P, n].
    """
    rewards = np.asarray(rewards, np.float64)
    advantages = rewards - rewards.mean(1, keepdims=True)
    if scale == "group":
        advantages = advantages / (rewards.std(1, ddof=1, keepdims=True) + STD_EPSILON)
    elif scale == "batch":
        advantages = advantages / (rewards.std(ddof=1) + STD_EPSILON)
    return advantages.astype(np.float32)


def equal_groups(rewards: np.ndarray) -> np.ndarray:
    """bool [P]: the groups of rewards [P, n] that are all equal, from which nothing is learned."""
    return np.all(rewards == rewards[:, :1], axis=1)


def generalized_advantages(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, *, gamma: float, gae_lambda: float
) -> tuple[np.ndarray, np.ndarray]:
    """Generalized advantage estimation (arXiv 1506.02438) over the tokens of each row.

        d_t = r_t + gamma V_{t+1} - V_t,    A_t = sum_k (gamma lambda)^k d_{t+k}

    The value after a row's last token is 0: a completion is an episode.

    Args:
      rewards: [B, T], of each token.
      values: [B, T], V_t, of the state before each token.
      mask: [B, T], 1 for the tokens of the episode, which are consecutive.
      gamma: discount.
      gae_lambda: lambda; 1 is the discounted return minus the value, 0 the one-step error.

    Returns:
      The advantages and the returns A + V, the value function's targets; f32 [B, T], 0 outside the mask.
    """
    rewards, values = (np.where(mask, x, 0.0).astype(np.float64) for x in (rewards, values))
    advantages = np.zeros_like(rewards)
    following = np.zeros(len(rewards))  # A_{t+1}
    for t in range(rewards.shape[1] - 1, -1, -1):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        error = rewards[:, t] + gamma * next_value - values[:, t]
        following = np.where(mask[:, t], error + gamma * gae_lambda * following, 0.0)
        advantages[:, t] = following
    returns = np.where(mask, advantages + values, 0.0)
    return advantages.astype(np.float32), returns.astype(np.float32)


def penalized_rewards(
    rewards: np.ndarray, logprobs: np.ndarray, reference: np.ndarray, mask: np.ndarray, *, beta: float
) -> np.ndarray:
    """The reward of each token: -beta log p / p_ref, and at a completion's last token its reward too.

    Llama 2, arXiv 2307.09288, section 3.2.3, whose penalty is this sum over the completion.

    Args:
      rewards: [B].
      logprobs, reference: [B, T], log-probabilities of the tokens, of the policy and of the reference model.
      mask: [B, T], 1 for the tokens of the completion.
      beta: weight of the penalty.

    Returns:
      f32 [B, T], 0 outside the mask.
    """
    mask = np.asarray(mask) > 0
    penalty = np.where(mask, -beta * (np.asarray(logprobs, np.float64) - reference), 0.0)
    last = mask & (np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    return (penalty + np.where(last, np.asarray(rewards, np.float64)[:, None], 0.0)).astype(np.float32)


def whiten(values: np.ndarray, mask: np.ndarray, *, shift_mean: bool = True) -> np.ndarray:
    """(x - mean) / std over the mask; with `shift_mean=False` the mean is added again.

    Args:
      values: [B, T].
      mask: [B, T].
      shift_mean: whether the result has the mean 0.

    Returns:
      f32 [B, T], 0 outside the mask.
    """
    chosen = np.asarray(values, np.float64)[np.asarray(mask) > 0]
    if not chosen.size:
        return np.zeros(np.shape(values), np.float32)
    mean, deviation = chosen.mean(), np.sqrt(chosen.var() + 1e-8)
    whitened = (values - mean) / deviation + (0.0 if shift_mean else mean)
    return np.where(mask, whitened, 0.0).astype(np.float32)
