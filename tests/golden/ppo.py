"""PPO as Llama 2 used it (arXiv 2307.09288, section 3.2.3; arXiv 1707.06347), stated in torch.

The formulas are those of TRL's PPOTrainer, which TRL 1.x has no more: a penalty in the rewards of
tokens, generalized advantage estimation, whitened advantages, clipped losses of policy and value.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Settings:
    """The hyperparameters, with TRL's names."""

    kl_coef: float = 0.05
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_scores: bool = False
    whiten_rewards: bool = False


def masked_mean(x: Any, mask: Any) -> Any:
    return (x * mask).sum() / mask.sum()


def masked_whiten(x: Any, mask: Any, shift_mean: bool = True) -> Any:
    mean = masked_mean(x, mask)
    white = (x - mean) * torch.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return (white if shift_mean else white + mean) * mask


def targets(scores: Any, logprobs: Any, ref_logprobs: Any, values: Any, mask: Any, settings: Settings) -> Any:
    """Advantages and returns [B, C] of completions that begin at column 0 and are padded on the right."""
    if settings.whiten_scores:
        scores = masked_whiten(scores, torch.ones_like(scores))
    rewards = -settings.kl_coef * (logprobs - ref_logprobs) * mask
    last = mask.sum(1).long() - 1
    rewards[torch.arange(len(rewards)), last] += scores
    if settings.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    values, following, reversed_advantages = values * mask, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        next_values = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + settings.gamma * next_values - values[:, t]
        following = (delta + settings.gamma * settings.lam * following) * mask[:, t]
        reversed_advantages.append(following)
    advantages = torch.stack(reversed_advantages[::-1], dim=1)
    returns = advantages + values
    return masked_whiten(advantages, mask), returns


def loss(
    new_logprobs: Any,
    new_values: Any,
    logprobs: Any,
    values: Any,
    advantages: Any,
    returns: Any,
    mask: Any,
    settings: Settings,
) -> tuple[Any, dict[str, float]]:
    """The loss, and the shares of policy and value losses that are clipped."""
    clipped_values = torch.clamp(
        new_values, values - settings.cliprange_value, values + settings.cliprange_value
    )
    squares, clipped_squares = (new_values - returns) ** 2, (clipped_values - returns) ** 2
    value_loss = 0.5 * masked_mean(torch.max(squares, clipped_squares), mask)
    ratio = torch.exp((new_logprobs - logprobs) * mask)
    plain = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1 - settings.cliprange, 1 + settings.cliprange)
    policy_loss = masked_mean(torch.max(plain, clipped), mask)
    told = {
        "clipped": masked_mean((clipped > plain).float(), mask).item(),
        "value_clipped": masked_mean((clipped_squares > squares).float(), mask).item(),
    }
    return policy_loss + settings.vf_coef * value_loss, told
