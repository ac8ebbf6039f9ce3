"""`[rl]`: rollouts, rewards and the loss of reinforcement learning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal, get_args

from llama_jax.errors import ConfigError

from .checks import check_applies, check_at_least, check_one_of
from .objective import RL_OBJECTIVES, Objective

PolicyLossType = Literal["grpo", "dapo", "dr_grpo"]
ScaleRewards = Literal["group", "batch", "none"]
RatioLevel = Literal["token", "sequence"]
Whiten = Literal["none", "scores", "rewards"]

# The objectives that a setting applies to; the others apply to all that sample.
_OBJECTIVES: Mapping[str, tuple[Objective, ...]] = {
    "rewards": RL_OBJECTIVES,
    "reward_weights": RL_OBJECTIVES,
    "beta": RL_OBJECTIVES,
    "epsilon": RL_OBJECTIVES,
    "epsilon_high": RL_OBJECTIVES,
    "importance_sampling_level": RL_OBJECTIVES,
    "loss_type": RL_OBJECTIVES,
    "overlap": RL_OBJECTIVES,
    "scale_rewards": ("grpo",),
    "use_bias_correction_kl": ("grpo",),
    "value_model": ("ppo",),
    "cliprange_value": ("ppo",),
    "vf_coef": ("ppo",),
    "gamma": ("ppo",),
    "gae_lambda": ("ppo",),
    "whiten": ("ppo",),
}


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Rollouts, rewards and the loss of `train.objective` `grpo` and `ppo`; names and defaults are TRL's.

    How completions are sampled applies to `distill` with `distillation.on_policy` too.

    Attributes:
      rewards: reward functions: `package.module:function`, `path/to/file.py:function`, or a built-in one:
        `exact_match`, `numeric_match`, `math_verify`, `format:REGEX`, `overlong:MAX,CACHE`; or `model:RUN`, a
        reward model, the directory of a run of `train.objective = "reward"`.
      reward_weights: the weight of each in the sum; all 1 by default.
      reward_timeout: seconds that one call of a reward function may take.
      failed_reward: the reward of an example on which a reward function raises or takes too long; each is
        named in the log. If it fails on every example of a batch, the run stops.
      num_generations: completions of each prompt, a group.
      max_completion_length: tokens of a completion, its end token included.
      temperature, top_k, top_p, min_p: of sampling, as in `llama_jax.Sampling`. The loss is that of the
        policy at this temperature.
      stop: strings that end a completion, which they are a part of.
      beta: weight of the KL divergence to the reference model; 0 needs none. Of `grpo` in the loss, of `ppo`
        in the reward of each token (Llama 2 used 0.01 for 7B and 13B, 0.005 for 34B and 70B).
      reference: the reference model, a path or a known name, with the trained one's architecture and
        vocabulary; empty is the model at the start.
      use_bias_correction_kl: of `grpo`, multiply the divergence of a token by its ratio, so that its gradient
        is that of the reverse KL (DeepSeek-V3.2, arXiv 2512.02556).
      epsilon, epsilon_high: ratios are clipped to 1 - epsilon and 1 + epsilon_high (DAPO's clip-higher, arXiv
        2503.14476); the latter is the former by default.
      importance_sampling_level: whether a ratio is a `token`'s, or the geometric mean over its `sequence`
        (GSPO, arXiv 2507.18071).
      loss_type: how losses of tokens are averaged: `grpo` over each completion, then over completions;
        `dapo` over all tokens; `dr_grpo` over completions, divided by max_completion_length.
      scale_rewards: of `grpo`, what the advantages r - mean(r) of a group are divided by: the standard
        deviation of the `group` or of the `batch`, or `none` (Dr. GRPO).
      num_iterations: how often each completion is trained on.
      steps_per_generation: the number of batches that are sampled at once.
      overlap: sample the next completions before the last update on the present ones, and reward them while
        it runs: they are of the weights before it, which the ratios correct for.
      value_model: of `ppo`, the reward model that the value function starts as, a network of its own: a run
        of `train.objective = "reward"`, or a Hugging Face directory of one, with the policy's vocabulary.
        Empty: the value is a new head on the policy's own last hidden states.
      cliprange_value: of `ppo`, how far a value may move from the one at sampling before its loss is clipped.
      vf_coef: of `ppo`, weight of the value function's loss.
      gamma, gae_lambda: of `ppo`, discount, and lambda of generalized advantage estimation.
      whiten: of `ppo`, what is divided by its standard deviation: the `scores` of completions, which get the
        mean 0 too, before the penalty (Llama 2, section 3.2.3); the `rewards` of tokens after it; or `none`.
        Advantages always are, and get the mean 0.

    Raises:
      ConfigError: for a value out of range.
    """

    rewards: tuple[str, ...] = ()
    reward_weights: tuple[float, ...] = ()
    reward_timeout: float = 10.0
    failed_reward: float = 0.0
    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    beta: float = 0.0
    reference: str = ""
    use_bias_correction_kl: bool = True
    epsilon: float = 0.2
    epsilon_high: float | None = None
    importance_sampling_level: RatioLevel = "token"
    loss_type: PolicyLossType = "dapo"
    scale_rewards: ScaleRewards = "group"
    num_iterations: int = 1
    steps_per_generation: int = 1
    overlap: bool = False
    value_model: str = ""
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten: Whiten = "scores"

    def __post_init__(self) -> None:
        for name in ("rewards", "reward_weights", "stop"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_one_of("rl.importance_sampling_level", self.importance_sampling_level, get_args(RatioLevel))
        check_one_of("rl.loss_type", self.loss_type, get_args(PolicyLossType))
        check_one_of("rl.scale_rewards", self.scale_rewards, get_args(ScaleRewards))
        check_one_of("rl.whiten", self.whiten, get_args(Whiten))
        check_at_least("rl", self, beta=0, epsilon=0, num_generations=1, max_completion_length=1)
        check_at_least("rl", self, num_iterations=1, steps_per_generation=1, top_k=0, min_p=0)
        check_at_least("rl", self, cliprange_value=0, vf_coef=0, gamma=0, gae_lambda=0)
        if self.epsilon_high is not None:
            check_at_least("rl", self, epsilon_high=0)
        for name in ("reward_timeout", "temperature", "top_p"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"rl.{name} is {getattr(self, name)}; it must be a number above 0")
        for name in ("top_p", "min_p", "gamma", "gae_lambda"):
            if getattr(self, name) > 1:
                raise ConfigError(f"rl.{name} is {getattr(self, name)}; it must be at most 1")
        if self.reference and not self.beta:
            raise ConfigError(
                f"rl.reference is {self.reference!r} and rl.beta 0, which needs no reference: set rl.beta, "
                "or leave it out"
            )
        if not math.isfinite(self.failed_reward):
            raise ConfigError(f"rl.failed_reward is {self.failed_reward}; it must be a finite number")
        if not all(self.stop):
            raise ConfigError("rl.stop has an empty string; remove it")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise ConfigError(
                f"rl.reward_weights has {len(self.reward_weights)} numbers and rl.rewards "
                f"{len(self.rewards)} functions; give a weight for each"
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise ConfigError("rl.reward_weights must be finite numbers")
        if twice := next((name for name in self.rewards if self.rewards.count(name) > 1), None):
            raise ConfigError(f"rl.rewards has {twice!r} twice; give it once, with a weight")

    def check_objective(self, objective: Objective) -> None:
        """Checks that no setting is set that the objective, one that samples, does not have.

        Raises:
          ConfigError: naming the setting, and the objectives that it applies to.
        """
        check_applies("rl", self, _OBJECTIVES, objective)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each reward function."""
        return self.reward_weights or (1.0,) * len(self.rewards)

    @property
    def updates_per_rollout(self) -> int:
        """The number of optimizer steps after each sampling of completions."""
        return self.num_iterations * self.steps_per_generation


def model_of(spec: str) -> str | None:
    """The reward model that an item of `rewards` names; None for a function."""
    return spec.removeprefix("model:") if spec.startswith("model:") else None
