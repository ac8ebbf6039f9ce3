"""`[preference]`: the loss of direct preference optimization."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from llama_jax.errors import ConfigError

from .checks import check_at_least, check_one_of

LossType = Literal["sigmoid", "ipo"]


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """The loss of `train.objective = "dpo"`, over pairs of a chosen and a rejected answer.

    Attributes:
      loss_type: `sigmoid` is DPO (arXiv 2305.18290), `ipo` is IPO (arXiv 2310.12036).
      beta: strength of the implicit KL penalty that keeps the policy close to the reference model.
      label_smoothing: assumed probability that a pair's labels are swapped (conservative DPO); below 0.5.
      precompute_ref_log_probs: compute the reference model's log-probabilities of every pair once, before the
        first step, instead of running it beside the policy in each step.

    Raises:
      ConfigError: for a value out of range, or label smoothing with another loss than `sigmoid`.
    """

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    precompute_ref_log_probs: bool = False

    def __post_init__(self) -> None:
        check_one_of("preference.loss_type", self.loss_type, get_args(LossType))
        check_at_least("preference", self, beta=0, label_smoothing=0)
        if self.beta == 0:
            raise ConfigError("preference.beta is 0; it must be above 0, such as 0.1")
        if self.label_smoothing >= 0.5:
            raise ConfigError(
                f"preference.label_smoothing is {self.label_smoothing}; it must be below 0.5, at which "
                "chosen and rejected answers are interchangeable"
            )
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ConfigError(
                f"preference.label_smoothing is {self.label_smoothing}, which applies to "
                'preference.loss_type "sigmoid" only; leave it out'
            )
