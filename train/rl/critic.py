"""What PPO needs beside log-probabilities: values and a reference of completions, and advantages from them.

One compiled program computes the values of all tokens, and their log-probabilities by the reference model,
once after each sampling of completions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from llama_jax import LlamaConfig
from llama_jax.decoding import processes
from llama_jax.model import hidden_states

from ..config.run import RunConfig
from ..feed import Feed
from ..network import Network
from ..objectives import with_prefix_backend
from ..objectives.common import forward_options
from ..objectives.policy import policy_logprobs
from ..objectives.ppo import token_values
from ..trainable import VALUE, Frozen, TrainableSpec
from .advantages import generalized_advantages, penalized_rewards, whiten
from .packing import Arrays
from .scoring import over_microbatches


class Critic:
    """Values of completions, and what is learned from them."""

    def __init__(
        self, run: RunConfig, model: LlamaConfig, platform: str, feed: Feed, trainable_spec: TrainableSpec
    ) -> None:
        self._rl, self._feed = run.rl, feed
        train = with_prefix_backend(run)
        options = forward_options(train, platform)
        logprobs_fn = policy_logprobs(
            model,
            options,
            temperature=run.rl.temperature,
            num_chunks=train.loss_chunks,
            longest=run.rl.max_completion_length,
        )

        def evaluate(params: Any, batch: Any, *, reference: Any = None) -> dict[str, jax.Array]:
            hidden = None
            if not isinstance(params[VALUE], Network):
                inputs = (batch["tokens"], batch["positions"], batch["segment_ids"])
                hidden = hidden_states(model, params, *inputs, options=options)
            found = {"values": token_values(params[VALUE], batch, hidden, options)}
            return found | (
                {} if reference is None else {"reference": logprobs_fn(reference, batch).logprobs}
            )

        wrapped = trainable_spec.wrap(evaluate)
        count = run.train.gradient_accumulation_steps

        @jax.jit
        def evaluated(trainable: Any, frozen: Frozen, batch: Any) -> dict[str, jax.Array]:
            return over_microbatches(lambda rows: wrapped(trainable, frozen, rows), batch, count)

        self._evaluated = evaluated

    def evaluate(
        self, trainable: Any, frozen: Frozen, parts: Iterable[Arrays]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Values, and the reference model's log-probabilities if there is one, f32 [R, T].

        Args:
          trainable, frozen: the parameters.
          parts: this process's rows of each batch of completions.
        """
        names = ("tokens", "segment_ids", "positions", "mask")
        found = [
            processes.fetch(
                self._evaluated(trainable, frozen, self._feed.put({name: part[name] for name in names}))
            )
            for part in parts
        ]
        values, reference = ([one[name] for one in found if name in one] for name in ("values", "reference"))
        return np.concatenate(values), np.concatenate(reference) if reference else None


def add_advantages(
    arrays: Arrays, scores: np.ndarray, values: np.ndarray, reference: np.ndarray | None, rl: Any
) -> dict[str, float]:
    """Adds `advantages`, `old_values` and `returns`, f32 [R, T], to the arrays of completions.

    Args:
      arrays: completions with their `old_logprobs`.
      scores: [R], the reward of each.
      values, reference: of `Critic.evaluate`.
      rl: the `rl` section.

    Returns:
      Means over tokens: `value`, `return`, `explained_variance` of the returns by the values, and with a
      reference `kl`, by the estimator k3.
    """
    mask, logprobs = arrays["mask"] > 0, arrays["old_logprobs"]
    if rl.whiten == "scores":
        scores = whiten(scores, np.ones(len(scores)))
    penalty = logprobs if reference is None else reference
    rewards = penalized_rewards(scores, logprobs, penalty, mask, beta=rl.beta)
    if rl.whiten == "rewards":
        rewards = whiten(rewards, mask, shift_mean=False)
    settings = {"gamma": rl.gamma, "gae_lambda": rl.gae_lambda}
    advantages, returns = generalized_advantages(rewards, values, mask, **settings)
    arrays["advantages"] = whiten(advantages, mask)
    arrays["old_values"], arrays["returns"] = np.where(mask, values, 0).astype(np.float32), returns
    metrics = {"value": values[mask].mean(), "return": returns[mask].mean()}
    if (spread := returns[mask].var()) > 0:
        metrics["explained_variance"] = 1 - (returns - values)[mask].var() / spread
    if reference is not None:
        difference = (reference.astype(np.float64) - logprobs)[mask]
        metrics["kl"] = (np.expm1(difference) - difference).mean()
    return {name: float(value) for name, value in metrics.items()}
